// Zeroes ranges of bytes before another tenant may see them.
#include "keepwarm.cuh"

// Bytes that become zero. 16 bytes.
struct Range {
    u8 *at;
    u64 bytes;
};

// Zeroes each of `count` ranges, of any length and alignment: 16 bytes at a time between the unaligned ends. Ranges may
// overlap.
extern "C" __global__ void __launch_bounds__(THREADS) scrub(const Range *ranges, u32 count) {
    u64 thread = (u64)blockIdx.x * THREADS + threadIdx.x, threads = (u64)gridDim.x * THREADS;
    for (u32 at = blockIdx.y; at < count; at += gridDim.y) {
        const Range range = ranges[at];
        u64 head = min((0 - (u64)range.at) % sizeof(uint4), range.bytes);
        u64 vectors = (range.bytes - head) / sizeof(uint4), tail = head + vectors * sizeof(uint4);
        for (u64 i = thread; i < head; i += threads) range.at[i] = 0;
        uint4 *body = (uint4 *)(range.at + head);
        for (u64 i = thread; i < vectors; i += threads) body[i] = make_uint4(0, 0, 0, 0);
        for (u64 i = tail + thread; i < range.bytes; i += threads) range.at[i] = 0;
    }
}
