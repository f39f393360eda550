// CUDA C++ for a CPU: what kernel sources expect to be there. Included before each source that softcuda compiles.
//
// `__global__` and `__shared__` are not macros: the step that compiles a source finds and replaces them. Every load and
// store of a kernel is reported to the runtime (runtime.cpp) through the thread sanitizer's calls, which softcuda
// answers itself; functions of this file that are marked SOFTCUDA_UNSEEN are left out and report by hand.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define __SOFTCUDA__ 1

#define SOFTCUDA_UNSEEN __attribute__((no_sanitize("thread")))

#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define __forceinline__ inline

// ---- vector types

#define SOFTCUDA_VECTORS(type, name)                                                                                   \
    struct name##1 { type x; };                                                                                        \
    struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                                           \
    struct name##3 { type x, y, z; };                                                                                  \
    struct alignas(sizeof(type) < 8 ? 4 * sizeof(type) : 16) name##4 { type x, y, z, w; };                             \
    static inline name##1 make_##name##1(type x) { return {x}; }                                                       \
    static inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                            \
    static inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }                                 \
    static inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }

SOFTCUDA_VECTORS(signed char, char)
SOFTCUDA_VECTORS(unsigned char, uchar)
SOFTCUDA_VECTORS(short, short)
SOFTCUDA_VECTORS(unsigned short, ushort)
SOFTCUDA_VECTORS(int, int)
SOFTCUDA_VECTORS(unsigned int, uint)
SOFTCUDA_VECTORS(long long, longlong)
SOFTCUDA_VECTORS(unsigned long long, ulonglong)
SOFTCUDA_VECTORS(float, float)
SOFTCUDA_VECTORS(double, double)
#undef SOFTCUDA_VECTORS

struct dim3 {
    unsigned int x, y, z;
    constexpr dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
};

// ---- between a kernel and the library: the layouts are those of launch.rs and module.rs

struct softcuda_launch {
    uint32_t grid[3];
    uint32_t block[3];
    uint32_t shared;
    const void *run;
    int (*live)(const void *run, uintptr_t at, uintptr_t *from, uintptr_t *to);
    void (*accessed)(const void *run, uintptr_t from, uintptr_t to, int access);
    void (*failed)(const void *run, const char *why);
    const bool *stop;
    // Null where races are not looked for.
    void (*raced)(const void *run, const char *earlier, const char *later, const char *kind, size_t offset, size_t bytes);
};

struct softcuda_kernel {
    const char *name;
    uint32_t parameters;
    const uint32_t *sizes;
    uint32_t (*run)(void *const *parameters, const softcuda_launch *launch);
};

namespace softcuda {

enum Access { READ = 0, WRITE = 1, ATOMIC = 2 };

/// Where a thread is.
struct Place {
    uint3 thread, block;
    dim3 block_shape, grid_shape;
    unsigned int lane;
};

/// What a warp's threads tell one another.
struct Exchanged {
    uint64_t value;
    unsigned int ballot;
};

// Answered by runtime.cpp.
const Place &place() __attribute__((const));
unsigned int barrier(bool predicate);
Exchanged exchange(const char *what, unsigned int mask, uint64_t value, int source, bool predicate);
unsigned int active();
void *dynamic_shared() __attribute__((const));
void touch(const void *at, size_t bytes, int access);
[[noreturn]] void fail(uint32_t code, const char *why);
uint32_t run(const softcuda_launch *launch, void (*body)(void *const *), void *const *parameters);

template <auto F> struct Kernel;

template <class... A, void (*F)(A...)> struct Kernel<F> {
    static constexpr uint32_t sizes[sizeof...(A) + 1] = {sizeof(A)..., 0};

    template <int... I> struct Indices {
        SOFTCUDA_UNSEEN static void call(void *const *parameters) { F(*static_cast<A *>(parameters[I])...); }
    };
    template <int N> static Indices<__integer_pack(N)...> count();

    SOFTCUDA_UNSEEN static void body(void *const *parameters) {
        decltype(count<sizeof...(A)>())::call(parameters);
    }
    SOFTCUDA_UNSEEN static uint32_t start(void *const *parameters, const softcuda_launch *launch) {
        return softcuda::run(launch, &body, parameters);
    }
    static constexpr softcuda_kernel describe(const char *name) {
        return {name, sizeof...(A), sizes, &start};
    }
};

template <class T> struct Same { using Type = T; };

} // namespace softcuda

#define threadIdx (softcuda::place().thread)
#define blockIdx (softcuda::place().block)
#define blockDim (softcuda::place().block_shape)
#define gridDim (softcuda::place().grid_shape)
static constexpr int warpSize = 32;

// ---- order

static inline void __syncthreads() { softcuda::barrier(false); }
static inline int __syncthreads_count(int predicate) { return (int)softcuda::barrier(predicate != 0); }
static inline int __syncthreads_or(int predicate) { return softcuda::barrier(predicate != 0) != 0; }
static inline int __syncthreads_and(int predicate) { return softcuda::barrier(predicate == 0) == 0; }
static inline void __threadfence() { __atomic_signal_fence(__ATOMIC_SEQ_CST); }
static inline void __threadfence_block() { __atomic_signal_fence(__ATOMIC_SEQ_CST); }
static inline void __threadfence_system() { __atomic_signal_fence(__ATOMIC_SEQ_CST); }
static inline void __nanosleep(unsigned int) {}
static inline void __trap() { softcuda::fail(719, "__trap() was called"); }

#undef assert
#define SOFTCUDA_TEXT_(x) #x
#define SOFTCUDA_TEXT(x) SOFTCUDA_TEXT_(x)
#define assert(condition)                                                                                              \
    ((condition) ? (void)0                                                                                             \
                 : softcuda::fail(710, __FILE__ ":" SOFTCUDA_TEXT(__LINE__) ": assertion '" #condition "' failed"))

// ---- warps

static inline void __syncwarp(unsigned int mask = 0xffffffffu) {
    softcuda::exchange("__syncwarp", mask, 0, 0, false);
}
static inline unsigned int __activemask() { return softcuda::active(); }
static inline unsigned int __ballot_sync(unsigned int mask, int predicate) {
    return softcuda::exchange("__ballot_sync", mask, 0, 0, predicate != 0).ballot;
}
static inline int __any_sync(unsigned int mask, int predicate) {
    return softcuda::exchange("__any_sync", mask, 0, 0, predicate != 0).ballot != 0;
}
static inline int __all_sync(unsigned int mask, int predicate) {
    return softcuda::exchange("__all_sync", mask, 0, 0, predicate == 0).ballot == 0;
}

namespace softcuda {
template <class T> SOFTCUDA_UNSEEN T shuffle(const char *what, unsigned int mask, T value, int source) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "shuffles move at most eight bytes");
    uint64_t bits = 0;
    __builtin_memcpy(&bits, &value, sizeof value);
    bits = exchange(what, mask, bits, source, false).value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}
static inline int lane() { return (int)place().lane; }
} // namespace softcuda

template <class T> T __shfl_sync(unsigned int mask, T value, int source, int width = 32) {
    int segment = softcuda::lane() & ~(width - 1);
    return softcuda::shuffle("__shfl_sync", mask, value, segment | (source & (width - 1)));
}
template <class T> T __shfl_up_sync(unsigned int mask, T value, unsigned int delta, int width = 32) {
    int lane = softcuda::lane(), segment = lane & ~(width - 1), source = lane - (int)delta;
    return softcuda::shuffle("__shfl_up_sync", mask, value, source < segment ? lane : source);
}
template <class T> T __shfl_down_sync(unsigned int mask, T value, unsigned int delta, int width = 32) {
    int lane = softcuda::lane(), last = lane | (width - 1), source = lane + (int)delta;
    return softcuda::shuffle("__shfl_down_sync", mask, value, source > last ? lane : source);
}
template <class T> T __shfl_xor_sync(unsigned int mask, T value, int lanes, int width = 32) {
    int lane = softcuda::lane(), last = lane | (width - 1), source = lane ^ lanes;
    return softcuda::shuffle("__shfl_xor_sync", mask, value, source > last ? lane : source);
}

// ---- atomics: streams are threads of the host, so they are the host's own atomic operations

#define SOFTCUDA_ATOMIC(name, builtin)                                                                                 \
    template <class T> SOFTCUDA_UNSEEN T name(T *at, typename softcuda::Same<T>::Type value) {                         \
        softcuda::touch(at, sizeof(T), softcuda::ATOMIC);                                                              \
        return builtin(at, value, __ATOMIC_RELAXED);                                                                   \
    }
SOFTCUDA_ATOMIC(atomicExch, __atomic_exchange_n)
SOFTCUDA_ATOMIC(atomicAnd, __atomic_fetch_and)
SOFTCUDA_ATOMIC(atomicOr, __atomic_fetch_or)
SOFTCUDA_ATOMIC(atomicXor, __atomic_fetch_xor)
#undef SOFTCUDA_ATOMIC

namespace softcuda {
template <class T, class F> SOFTCUDA_UNSEEN T change(T *at, F next) {
    touch(at, sizeof(T), ATOMIC);
    T before, after;
    __atomic_load(at, &before, __ATOMIC_RELAXED);
    do {
        after = next(before);
    } while (!__atomic_compare_exchange(at, &before, &after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return before;
}
} // namespace softcuda

#define SOFTCUDA_CHANGE(name, expression)                                                                              \
    template <class T> SOFTCUDA_UNSEEN T name(T *at, typename softcuda::Same<T>::Type value) {                         \
        return softcuda::change(at, [=](T old) SOFTCUDA_UNSEEN { return (T)(expression); });                           \
    }
SOFTCUDA_CHANGE(atomicAdd, old + value)
SOFTCUDA_CHANGE(atomicSub, old - value)
SOFTCUDA_CHANGE(atomicMin, value < old ? value : old)
SOFTCUDA_CHANGE(atomicMax, value > old ? value : old)
SOFTCUDA_CHANGE(atomicInc, old >= value ? 0 : old + 1)
SOFTCUDA_CHANGE(atomicDec, old == 0 || old > value ? value : old - 1)
#undef SOFTCUDA_CHANGE

template <class T>
SOFTCUDA_UNSEEN T atomicCAS(T *at, typename softcuda::Same<T>::Type expected, typename softcuda::Same<T>::Type value) {
    softcuda::touch(at, sizeof(T), softcuda::ATOMIC);
    __atomic_compare_exchange_n(at, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return expected;
}

// ---- memory

static inline void *softcuda_memcpy(void *to, const void *from, size_t bytes) {
    softcuda::touch(from, bytes, softcuda::READ);
    softcuda::touch(to, bytes, softcuda::WRITE);
    return __builtin_memcpy(to, from, bytes);
}
static inline void *softcuda_memset(void *to, int value, size_t bytes) {
    softcuda::touch(to, bytes, softcuda::WRITE);
    return __builtin_memset(to, value, bytes);
}
#define memcpy(to, from, bytes) softcuda_memcpy(to, from, bytes)
#define memset(to, value, bytes) softcuda_memset(to, value, bytes)

template <class T> static inline T __ldg(const T *at) { return *at; }

// ---- arithmetic

template <class T> static inline T min(T a, typename softcuda::Same<T>::Type b) { return b < a ? b : a; }
template <class T> static inline T max(T a, typename softcuda::Same<T>::Type b) { return a < b ? b : a; }
static inline int __popc(unsigned int x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz((unsigned int)x); }
static inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll((unsigned long long)x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __ffsll(long long x) { return __builtin_ffsll(x); }
static inline unsigned int __umulhi(unsigned int a, unsigned int b) {
    return (unsigned int)(((unsigned long long)a * b) >> 32);
}
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)(((unsigned __int128)a * b) >> 64);
}
static inline unsigned int __funnelshift_l(unsigned int low, unsigned int high, unsigned int shift) {
    return (unsigned int)(((((unsigned long long)high << 32) | low) << (shift & 31)) >> 32);
}
static inline unsigned int __funnelshift_r(unsigned int low, unsigned int high, unsigned int shift) {
    return (unsigned int)((((unsigned long long)high << 32) | low) >> (shift & 31));
}
static inline unsigned int __byte_perm(unsigned int low, unsigned int high, unsigned int selector) {
    unsigned long long bytes = ((unsigned long long)high << 32) | low;
    unsigned int result = 0;
    for (int i = 0; i < 4; i++) {
        unsigned int choice = selector >> (4 * i), byte = (unsigned int)(bytes >> (8 * (choice & 7))) & 255;
        result |= (choice & 8 ? (byte & 128 ? 255u : 0u) : byte) << (8 * i);
    }
    return result;
}
#define SOFTCUDA_BITS(name, from, to)                                                                                  \
    static inline to name(from x) {                                                                                    \
        to y;                                                                                                          \
        __builtin_memcpy(&y, &x, sizeof y);                                                                            \
        return y;                                                                                                      \
    }
SOFTCUDA_BITS(__float_as_uint, float, unsigned int)
SOFTCUDA_BITS(__float_as_int, float, int)
SOFTCUDA_BITS(__uint_as_float, unsigned int, float)
SOFTCUDA_BITS(__int_as_float, int, float)
SOFTCUDA_BITS(__double_as_longlong, double, long long)
SOFTCUDA_BITS(__longlong_as_double, long long, double)
#undef SOFTCUDA_BITS
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline int __float2int_rn(float x) { return (int)rintf(x); }
static inline int __float2int_rz(float x) { return (int)x; }
static inline unsigned int __float2uint_rn(float x) { return (unsigned int)rintf(x); }
static inline float __int2float_rn(int x) { return (float)x; }
static inline float __uint2float_rn(unsigned int x) { return (float)x; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fdividef(float a, float b) { return a / b; }
