// Runs the blocks of a kernel on one thread of the host: a fiber for each thread of a block that has to wait for
// others, checks of every access against live memory, and a record of what was read and written. Linked into each
// shared object of kernels; is itself not instrumented.
//
// Blocks run one after the other. The threads of a block run in turn, each until it ends or waits for others, in the
// order of SOFTCUDA_KERNEL_ORDER (`up`, or `down`, which shows many a missing __syncthreads).
#include "softcuda.h"
#undef memcpy
#undef memset

#include <algorithm>
#include <cstdlib>
#include <dlfcn.h>
#include <link.h>
#include <memory>
#include <sys/mman.h>
#include <unordered_map>
#include <vector>

namespace {

constexpr size_t STACK = 128 << 10; // a thread's local memory
constexpr size_t GUARD = 4096;
constexpr unsigned char POISON_SHARED = 0xC5;
constexpr size_t PAGE = 4096;

// ---- switching stacks

#if defined(__x86_64__) && !defined(SOFTCUDA_UCONTEXT)

using Context = void *;

extern "C" void softcuda_switch(void **save, void *to);
asm(R"(
.text
.type softcuda_switch, @function
softcuda_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size softcuda_switch, .-softcuda_switch
)");

void switch_stack(Context *save, Context *to) { softcuda_switch(save, *to); }

void prepare(Context *context, char *stack, void (*entry)()) {
    // As `softcuda_switch` leaves a stack: six registers, then the address to return to, and that with the alignment
    // that a called function finds.
    void **top = reinterpret_cast<void **>(stack + STACK) - 2;
    top[0] = reinterpret_cast<void *>(entry);
    top[1] = nullptr;
    *context = top - 6;
    for (int i = 1; i <= 6; i++) top[-i] = nullptr;
}

#else

#include <ucontext.h>

using Context = ucontext_t;

void switch_stack(Context *save, Context *to) { swapcontext(save, to); }

void prepare(Context *context, char *stack, void (*entry)()) {
    getcontext(context);
    context->uc_stack.ss_sp = stack;
    context->uc_stack.ss_size = STACK;
    context->uc_link = nullptr;
    makecontext(context, entry, 0);
}

#endif

/// A stack with a page before it that nobody may touch.
struct Fiber {
    char *mapping = nullptr;
    Context context{};

    Fiber() {
        void *at = mmap(nullptr, GUARD + STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (at == MAP_FAILED) {
            fputs("softcuda: no memory for the stack of a kernel's thread\n", stderr);
            abort();
        }
        mapping = static_cast<char *>(at);
        mprotect(mapping, GUARD, PROT_NONE);
    }
    ~Fiber() { munmap(mapping, GUARD + STACK); }
    Fiber(const Fiber &) = delete;
    char *stack() const { return mapping + GUARD; }
};

// ---- ranges and pages

struct Range {
    uintptr_t from = 0, to = 0;
    bool holds(uintptr_t at, size_t bytes) const { return at >= from && at < to && bytes <= to - at; }
};

/// Which bytes of a page the kernel touched, a bit each.
struct Page {
    uint64_t bits[3][PAGE / 64] = {};
};

/// Who touched a byte of shared memory in one way, since the last barrier.
struct Touch {
    uint32_t thread = 0; // its number and one more; 0 is nobody
    uint32_t epoch = 0, warp_epoch = 0;
    bool several = false;   // others of the same warp too
    bool elsewhere = false; // others of other warps too
};

/// A byte of shared memory: its last write, and the reads and the atomic changes since then.
struct Cell {
    Touch by[3];
};

/// This object's image, and its thread-local block on the calling thread: constants and shared memory.
struct Image {
    std::vector<Range> segments;
    Range shared;
};

int look(dl_phdr_info *info, size_t, void *data) {
    auto &image = *static_cast<Image *>(data);
    auto own = reinterpret_cast<uintptr_t>(&look);
    std::vector<Range> segments;
    Range shared;
    bool here = false;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const auto &header = info->dlpi_phdr[i];
        if (header.p_type == PT_LOAD) {
            Range range{info->dlpi_addr + header.p_vaddr, info->dlpi_addr + header.p_vaddr + header.p_memsz};
            here |= range.holds(own, 1);
            segments.push_back(range);
        } else if (header.p_type == PT_TLS && info->dlpi_tls_data != nullptr) {
            auto at = reinterpret_cast<uintptr_t>(info->dlpi_tls_data);
            shared = {at, at + header.p_memsz};
        }
    }
    if (!here) return 0;
    image = {std::move(segments), shared};
    return 1;
}

// ---- a block

enum State { FRESH, READY, AT_BARRIER, AT_EXCHANGE, ENDED };

struct Thread {
    softcuda::Place place{};
    State state = FRESH;
    Fiber *fiber = nullptr;
    bool predicate = false;
    // What it brings to an exchange, and what it takes from one or from a barrier.
    const char *what = nullptr;
    unsigned int mask = 0;
    int source = 0;
    uint64_t value = 0;
    softcuda::Exchanged taken{};
    unsigned int count = 0;
};

struct Block {
    const softcuda_launch *launch = nullptr;
    void (*body)(void *const *) = nullptr;
    void *const *parameters = nullptr;
    std::vector<Thread> threads;
    Thread *current = nullptr;
    Context scheduler{};
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Fiber *> spare;
    std::unique_ptr<void, decltype(&free)> dynamic{nullptr, &free};
    size_t dynamic_bytes = 0;
    uint32_t code = 0;
    bool down = false;
    Image image;
    Range known; // of device memory, used last
    std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
    struct { uintptr_t number; Page *page; } near[64] = {};
    // Races in shared memory: barriers of the block so far, those of each warp, and the last touches of each byte.
    uint32_t epoch = 0;
    std::vector<uint32_t> warp_epochs;
    std::vector<Cell> cells;
    bool raced = false;
};

/// The only thread-local state of this file: shared memory lies in the same block, and is poisoned around it.
thread_local Block *running = nullptr;

void suspend(Block *block, State state) {
    Thread *thread = block->current;
    thread->state = state;
    switch_stack(&thread->fiber->context, &block->scheduler);
}

void enter() {
    // A fiber serves one thread after the other, for as long as they end without waiting.
    for (;;) {
        Block *block = running;
        block->body(block->parameters);
        suspend(block, ENDED);
    }
}

void resume(Block *block, Thread &thread) {
    if (thread.fiber == nullptr) {
        if (block->spare.empty()) {
            block->fibers.push_back(std::make_unique<Fiber>());
            block->spare.push_back(block->fibers.back().get());
            prepare(&block->spare.back()->context, block->spare.back()->stack(), &enter);
        }
        thread.fiber = block->spare.back();
        block->spare.pop_back();
    }
    block->current = &thread;
    switch_stack(&block->scheduler, &thread.fiber->context);
    block->current = nullptr;
    if (thread.state == ENDED) {
        block->spare.push_back(thread.fiber);
        thread.fiber = nullptr;
    }
}

void say(Block *block, uint32_t code, const char *why) {
    block->code = code;
    block->launch->failed(block->launch->run, why);
}

/// Where a thread is, for messages.
void where(const Thread &thread, char *text, size_t bytes) {
    const auto &b = thread.place.block;
    const auto &t = thread.place.thread;
    snprintf(text, bytes, "block (%u, %u, %u), thread (%u, %u, %u)", b.x, b.y, b.z, t.x, t.y, t.z);
}

/// Lets a barrier or an exchange go on whose threads are all there; true if one could.
bool settle(Block *block) {
    bool released = false;
    auto &threads = block->threads;
    size_t waiting = 0, ended = 0;
    unsigned int count = 0;
    for (auto &thread : threads) {
        waiting += thread.state == AT_BARRIER;
        ended += thread.state == ENDED;
        count += thread.state == AT_BARRIER && thread.predicate;
    }
    if (waiting > 0 && waiting + ended == threads.size()) {
        block->epoch++;
        for (auto &thread : threads) {
            if (thread.state != AT_BARRIER) continue;
            thread.count = count;
            thread.state = READY;
        }
        return true;
    }
    for (size_t first = 0; first < threads.size(); first += 32) {
        size_t lanes = std::min<size_t>(32, threads.size() - first);
        Thread *warp = &threads[first];
        for (size_t lane = 0; lane < lanes; lane++) {
            if (warp[lane].state != AT_EXCHANGE) continue;
            unsigned int mask = warp[lane].mask, ballot = 0, there = 0;
            bool complete = true;
            for (size_t other = 0; other < lanes; other++) {
                if (!(mask >> other & 1) || warp[other].state == ENDED) continue;
                complete &= warp[other].state == AT_EXCHANGE && warp[other].mask == mask;
                there |= 1u << other;
                ballot |= (warp[other].predicate ? 1u : 0u) << other;
            }
            if (!complete) continue;
            for (size_t other = 0; other < lanes; other++) {
                Thread &thread = warp[other];
                if (!(there >> other & 1)) continue;
                if (thread.what != warp[lane].what) {
                    char text[256], place[96];
                    where(thread, place, sizeof place);
                    snprintf(text, sizeof text, "%s is at %s while its warp is at %s", place, thread.what, warp[lane].what);
                    say(block, 719, text);
                    return false;
                }
                bool known = thread.source >= 0 && thread.source < 32 && (there >> thread.source & 1);
                // What a lane that takes no part would give is not defined: poison.
                thread.taken = {known ? warp[thread.source].value : 0xC5C5C5C5C5C5C5C5u, ballot};
            }
            block->warp_epochs[first / 32]++;
            for (size_t other = 0; other < lanes; other++) {
                if (there >> other & 1) warp[other].state = READY;
            }
            released = true;
        }
    }
    return released;
}

void run_block(Block *block, uint3 index) {
    if (block->image.shared.to > block->image.shared.from) {
        // __shared__ variables are this object's thread-local ones: undefined where a block begins.
        Block *kept = running;
        memset(reinterpret_cast<void *>(block->image.shared.from), POISON_SHARED,
               block->image.shared.to - block->image.shared.from);
        // The compiler does not know that this was filled too.
        asm volatile("" : : "r"(&running) : "memory");
        running = kept;
    }
    if (block->dynamic_bytes > 0) memset(block->dynamic.get(), POISON_SHARED, block->dynamic_bytes);
    block->epoch++;
    for (auto &thread : block->threads) {
        thread.state = FRESH;
        thread.place.block = index;
    }
    size_t count = block->threads.size();
    for (;;) {
        bool ended = true;
        for (size_t i = 0; i < count; i++) {
            Thread &thread = block->threads[block->down ? count - 1 - i : i];
            if (thread.state == FRESH || thread.state == READY) resume(block, thread);
            if (block->code != 0) return;
            ended &= thread.state == ENDED;
        }
        if (ended) return;
        if (settle(block)) continue;
        if (block->code != 0) return;
        for (auto &thread : block->threads) {
            if (thread.state == ENDED) continue;
            char text[256], place[96];
            where(thread, place, sizeof place);
            snprintf(text, sizeof text, "%s waits at %s for threads that never come: a GPU would hang here", place,
                     thread.state == AT_BARRIER ? "__syncthreads" : thread.what);
            say(block, 702, text);
            return;
        }
    }
}

/// Tells the library which bytes were touched, in runs.
void tell(Block *block) {
    std::vector<uintptr_t> numbers;
    for (auto &entry : block->pages) numbers.push_back(entry.first);
    std::sort(numbers.begin(), numbers.end());
    for (int access = 0; access < 3; access++) {
        Range range;
        auto flush = [&] {
            if (range.from < range.to) block->launch->accessed(block->launch->run, range.from, range.to, access);
        };
        for (uintptr_t number : numbers) {
            const uint64_t *bits = block->pages[number]->bits[access];
            for (size_t word = 0; word < PAGE / 64; word++) {
                for (unsigned int bit = 0; bit < 64 && bits[word] >> bit != 0; bit++) {
                    if (!(bits[word] >> bit & 1)) continue;
                    uintptr_t at = number * PAGE + word * 64 + bit;
                    if (at != range.to) {
                        flush();
                        range.from = at;
                    }
                    range.to = at + 1;
                }
            }
        }
        flush();
    }
}

void record(Block *block, uintptr_t at, size_t bytes, int access) {
    while (bytes > 0) {
        uintptr_t number = at / PAGE;
        auto &near = block->near[number % 64];
        if (near.page == nullptr || near.number != number) {
            auto &page = block->pages[number];
            if (!page) page = std::make_unique<Page>();
            near = {number, page.get()};
        }
        size_t offset = at % PAGE, bit = offset % 64, count = std::min<size_t>(bytes, 64 - bit);
        near.page->bits[access][offset / 64] |= (count == 64 ? ~0ull : (1ull << count) - 1) << bit;
        at += count;
        bytes -= count;
    }
}

const char *const WORDS[3] = {"reads", "writes", "changes"};

[[noreturn]] void refuse(uint32_t code, const char *why, uintptr_t at, size_t bytes, int access, void *from) {
    char text[1024], place[96];
    where(*running->current, place, sizeof place);
    Dl_info info{};
    uintptr_t base = dladdr(from, &info) != 0 ? reinterpret_cast<uintptr_t>(info.dli_fbase) : 0;
    snprintf(text, sizeof text, "%s %s %zu bytes at %#zx, %s; the line: addr2line -Cfipe %s %#zx", place, WORDS[access],
             bytes, at, why, info.dli_fname == nullptr ? "?" : info.dli_fname,
             reinterpret_cast<uintptr_t>(from) - base - 1);
    softcuda::fail(code, text);
}

void misaligned(uintptr_t at, size_t bytes, int access, void *from) {
    if (running == nullptr || running->current == nullptr) return;
    refuse(716, "which is not a multiple of its size", at, bytes, access, from);
}

/// Whether nothing orders a touch before the current thread's.
bool unordered(const Block *block, const Touch &touch, uint32_t thread) {
    if (touch.thread == 0 || touch.epoch != block->epoch) return false;
    uint32_t warp = (thread - 1) / 32;
    if (touch.elsewhere || (touch.thread - 1) / 32 != warp) return true;
    return touch.warp_epoch == block->warp_epochs[warp] && (touch.several || touch.thread != thread);
}

/// Adds the current thread to those who read, or changed atomically.
void join(const Block *block, Touch &touch, uint32_t thread) {
    uint32_t warp = (thread - 1) / 32;
    if (!unordered(block, touch, thread)) {
        touch = {thread, block->epoch, block->warp_epochs[warp]};
        return;
    }
    bool same = (touch.thread - 1) / 32 == warp;
    touch.several |= same;
    touch.elsewhere |= !same;
    if (same) touch.warp_epoch = block->warp_epochs[warp];
}

/// Looks for a race between the threads of a block; tells one of each launch.
void hazard(Block *block, size_t offset, size_t bytes, int access, void *from) {
    static const char *const KINDS[3][3] = {
        // after a read, a write, an atomic change
        {nullptr, "read after write", "read after atomic"},
        {"write after read", "write after write", "write after atomic"},
        {"atomic after read", "atomic after write", nullptr},
    };
    if (block->launch->raced == nullptr || block->raced) return;
    if (block->cells.empty()) {
        block->cells.resize(block->image.shared.to - block->image.shared.from + block->dynamic_bytes);
    }
    auto thread = static_cast<uint32_t>(block->current - block->threads.data()) + 1;
    for (size_t at = offset; at < offset + bytes; at++) {
        Cell &cell = block->cells[at];
        for (int before = 0; before < 3; before++) {
            const Touch &touch = cell.by[before];
            if (KINDS[access][before] == nullptr || !unordered(block, touch, thread)) continue;
            char earlier[160], later[640], place[96];
            where(block->threads[touch.thread - 1], place, sizeof place);
            snprintf(earlier, sizeof earlier, "%s", place);
            where(*block->current, place, sizeof place);
            Dl_info info{};
            uintptr_t base = dladdr(from, &info) != 0 ? reinterpret_cast<uintptr_t>(info.dli_fbase) : 0;
            snprintf(later, sizeof later, "%s (the line: addr2line -Cfipe %s %#zx)", place,
                     info.dli_fname == nullptr ? "?" : info.dli_fname, reinterpret_cast<uintptr_t>(from) - base - 1);
            block->raced = true;
            block->launch->raced(block->launch->run, earlier, later, KINDS[access][before], offset, bytes);
            return;
        }
        if (access == softcuda::WRITE) {
            cell = {};
            cell.by[access] = {thread, block->epoch, block->warp_epochs[(thread - 1) / 32]};
        } else {
            join(block, cell.by[access], thread);
        }
    }
}

void check(const void *pointer, size_t bytes, int access, void *from) {
    Block *block = running;
    if (block == nullptr || block->current == nullptr || bytes == 0) return;
    if (__atomic_load_n(block->launch->stop, __ATOMIC_RELAXED)) softcuda::fail(719, "stopped: its context was reset");
    auto at = reinterpret_cast<uintptr_t>(pointer);
    if (!block->known.holds(at, bytes)) {
        auto stack = reinterpret_cast<uintptr_t>(block->current->fiber->stack());
        auto dynamic = reinterpret_cast<uintptr_t>(block->dynamic.get());
        auto threads = reinterpret_cast<uintptr_t>(block->threads.data());
        if (block->image.shared.holds(at, bytes)) {
            return hazard(block, at - block->image.shared.from, bytes, access, from);
        }
        if (Range{dynamic, dynamic + block->dynamic_bytes}.holds(at, bytes)) {
            size_t fixed = block->image.shared.to - block->image.shared.from;
            return hazard(block, fixed + (at - dynamic), bytes, access, from);
        }
        if (Range{stack, stack + STACK}.holds(at, bytes) ||
            (access == softcuda::READ &&
             Range{threads, threads + block->threads.size() * sizeof(Thread)}.holds(at, bytes))) {
            return;
        }
        for (const auto &segment : block->image.segments) {
            if (segment.holds(at, bytes)) return;
        }
        Range range;
        if (!block->launch->live(block->launch->run, at, &range.from, &range.to) || !range.holds(at, bytes)) {
            refuse(700, "where it has no live memory", at, bytes, access, from);
        }
        block->known = range;
    }
    record(block, at, bytes, access);
}

} // namespace

namespace softcuda {

const Place &place() { return running->current->place; }

unsigned int barrier(bool predicate) {
    Block *block = running;
    Thread *thread = block->current;
    thread->predicate = predicate;
    suspend(block, AT_BARRIER);
    return thread->count;
}

Exchanged exchange(const char *what, unsigned int mask, uint64_t value, int source, bool predicate) {
    Block *block = running;
    Thread *thread = block->current;
    if (!(mask >> thread->place.lane & 1)) fail(719, "a thread is not in the mask that it names");
    thread->what = what;
    thread->mask = mask;
    thread->value = value;
    thread->source = source;
    thread->predicate = predicate;
    suspend(block, AT_EXCHANGE);
    return thread->taken;
}

unsigned int active() {
    // The threads of a warp do not run in lockstep here: as after divergence, each is on its own.
    return 1u << running->current->place.lane;
}

void *dynamic_shared() { return running->dynamic.get(); }

void touch(const void *at, size_t bytes, int access) { check(at, bytes, access, __builtin_return_address(0)); }

void fail(uint32_t code, const char *why) {
    Block *block = running;
    say(block, code, why);
    // This stack is given up: nobody resumes a block that failed.
    suspend(block, AT_BARRIER);
    abort();
}

uint32_t run(const softcuda_launch *launch, void (*body)(void *const *), void *const *parameters) {
    Block block;
    block.launch = launch;
    block.body = body;
    block.parameters = parameters;
    block.dynamic_bytes = launch->shared;
    block.dynamic.reset(aligned_alloc(128, (static_cast<size_t>(launch->shared) / 128 + 1) * 128));
    const char *order = getenv("SOFTCUDA_KERNEL_ORDER");
    block.down = order != nullptr && strcmp(order, "down") == 0;
    running = &block;
    dl_iterate_phdr(&look, &block.image);
    const uint32_t *shape = launch->block, *grid = launch->grid;
    block.threads.resize(static_cast<size_t>(shape[0]) * shape[1] * shape[2]);
    for (size_t i = 0; i < block.threads.size(); i++) {
        Place &place = block.threads[i].place;
        place.thread = {(unsigned)(i % shape[0]), (unsigned)(i / shape[0] % shape[1]), (unsigned)(i / shape[0] / shape[1])};
        place.block_shape = dim3(shape[0], shape[1], shape[2]);
        place.grid_shape = dim3(grid[0], grid[1], grid[2]);
        place.lane = i % 32;
    }
    block.warp_epochs.resize((block.threads.size() + 31) / 32);
    for (unsigned int z = 0; z < grid[2]; z++) {
        for (unsigned int y = 0; y < grid[1]; y++) {
            for (unsigned int x = 0; x < grid[0] && block.code == 0; x++) run_block(&block, {x, y, z});
        }
    }
    running = nullptr;
    if (block.code == 0) tell(&block);
    return block.code;
}

} // namespace softcuda

// ---- what the thread sanitizer's instrumentation calls

#define SOFTCUDA_HOOK(name, bytes, access)                                                                             \
    extern "C" void name(void *at) { check(at, bytes, access, __builtin_return_address(0)); }
#define SOFTCUDA_ALIGNED(name, bytes, access)                                                                          \
    extern "C" void name(void *at) {                                                                                   \
        if (reinterpret_cast<uintptr_t>(at) % bytes != 0) {                                                            \
            misaligned(reinterpret_cast<uintptr_t>(at), bytes, access, __builtin_return_address(0));                   \
        }                                                                                                              \
        check(at, bytes, access, __builtin_return_address(0));                                                         \
    }
SOFTCUDA_HOOK(__tsan_read1, 1, softcuda::READ)
SOFTCUDA_ALIGNED(__tsan_read2, 2, softcuda::READ)
SOFTCUDA_ALIGNED(__tsan_read4, 4, softcuda::READ)
SOFTCUDA_ALIGNED(__tsan_read8, 8, softcuda::READ)
SOFTCUDA_ALIGNED(__tsan_read16, 16, softcuda::READ)
SOFTCUDA_HOOK(__tsan_write1, 1, softcuda::WRITE)
SOFTCUDA_ALIGNED(__tsan_write2, 2, softcuda::WRITE)
SOFTCUDA_ALIGNED(__tsan_write4, 4, softcuda::WRITE)
SOFTCUDA_ALIGNED(__tsan_write8, 8, softcuda::WRITE)
SOFTCUDA_ALIGNED(__tsan_write16, 16, softcuda::WRITE)
SOFTCUDA_HOOK(__tsan_unaligned_read2, 2, softcuda::READ)
SOFTCUDA_HOOK(__tsan_unaligned_read4, 4, softcuda::READ)
SOFTCUDA_HOOK(__tsan_unaligned_read8, 8, softcuda::READ)
SOFTCUDA_HOOK(__tsan_unaligned_read16, 16, softcuda::READ)
SOFTCUDA_HOOK(__tsan_unaligned_write2, 2, softcuda::WRITE)
SOFTCUDA_HOOK(__tsan_unaligned_write4, 4, softcuda::WRITE)
SOFTCUDA_HOOK(__tsan_unaligned_write8, 8, softcuda::WRITE)
SOFTCUDA_HOOK(__tsan_unaligned_write16, 16, softcuda::WRITE)
extern "C" void __tsan_read_range(void *at, unsigned long bytes) {
    check(at, bytes, softcuda::READ, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void *at, unsigned long bytes) {
    check(at, bytes, softcuda::WRITE, __builtin_return_address(0));
}
extern "C" void __tsan_vptr_update(void **, void *) {}
extern "C" void __tsan_init() {}

// ---- what the bounds sanitizer's instrumentation calls

struct OutOfBounds {
    const char *file;
    uint32_t line, column;
    const void *array, *index;
};

/// An index outside of an array whose length the source says: shared memory, or a thread's own.
extern "C" void __ubsan_handle_out_of_bounds_abort(OutOfBounds *site, size_t index) {
    if (running == nullptr || running->current == nullptr) abort();
    char text[512], place[96];
    where(*running->current, place, sizeof place);
    snprintf(text, sizeof text, "%s uses index %zd of a shorter array at %s:%u:%u", place, static_cast<ssize_t>(index),
             site->file, site->line, site->column);
    softcuda::fail(700, text);
}
