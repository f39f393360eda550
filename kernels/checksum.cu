// Checksums of blocks, bit for bit those of the CPU: XXH3-128 over the list of XXH3-64 of 4 KiB chunks. Chunks are hashed
// in parallel, a warp each; then one warp hashes each run's list, so that 16 bytes of a run go back to the host.
#include "xxh3.cuh"

// Equal rows of bytes, a pitch apart. 32 bytes.
struct Rows {
    const u8 *at;
    u64 pitch; // from a row's first byte to the next row's
    u64 bytes; // of a row
    u64 rows;
};

// Bytes with one checksum: rows after rows, as if they lay end to end. 32 bytes.
struct Run {
    const Rows *rows; // as many as have `bytes` together
    u64 bytes;
    u64 *chunks;       // room for a word for each 4 KiB, the last of which may be short
    Hash128 *checksum; // low half first
};

#define CHUNK 4096u

// Copies `length` bytes of rows, from the byte `from` of all on, to where a warp hashes them.
__device__ __forceinline__ void stage(const Rows *rows, u64 from, u32 length, u8 *to, u32 lane) {
    for (; length > 0; rows++) {
        const Rows of = *rows;
        if (from >= of.bytes * of.rows) {
            from -= of.bytes * of.rows;
            continue;
        }
        u64 row = from / of.bytes;
        for (from -= row * of.bytes; row < of.rows && length > 0; row++, from = 0) {
            u32 bytes = (u32)min(of.bytes - from, (u64)length);
            copy_by_warp(to, of.at + row * of.pitch + from, bytes, lane);
            to += bytes;
            length -= bytes;
        }
    }
}

// Writes the XXH3-64 of each chunk of each of `count` runs. A warp stages a chunk in shared memory, where its words are
// aligned whatever the rows are, and hashes it there.
//
// Assumes that nothing writes to the rows meanwhile. Rows may be empty, runs too. Four blocks fit a multiprocessor of any
// GPU from compute capability 8.0 on: 64 registers of a thread, 32 KiB of a block.
extern "C" __global__ void __launch_bounds__(THREADS, 4) hash_chunks(const Run *runs, u32 count) {
    __shared__ uint4 staged[WARPS][CHUNK / sizeof(uint4)];
    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    u64 *words = (u64 *)staged[warp];
    for (u32 at = blockIdx.y; at < count; at += gridDim.y) {
        const Run run = runs[at];
        u64 chunks = (run.bytes + CHUNK - 1) / CHUNK;
        for (u64 chunk = (u64)blockIdx.x * WARPS + warp; chunk < chunks; chunk += (u64)gridDim.x * WARPS) {
            u32 length = (u32)min(run.bytes - chunk * CHUNK, (u64)CHUNK);
            stage(run.rows, chunk * CHUNK, length, (u8 *)words, lane);
            __syncwarp();
            u64 hash = hash64(words, length, lane);
            if (lane == 0) run.chunks[chunk] = hash;
            __syncwarp();
        }
    }
}

// Writes the checksum of each of `count` runs, once `hash_chunks` has written their chunks' words: a warp for each run,
// whatever the grid's shape.
extern "C" __global__ void __launch_bounds__(THREADS) hash_runs(const Run *runs, u32 count) {
    u32 lane = threadIdx.x % WARP;
    u64 block = (u64)blockIdx.y * gridDim.x + blockIdx.x, warps = (u64)gridDim.x * gridDim.y * WARPS;
    for (u64 at = block * WARPS + threadIdx.x / WARP; at < count; at += warps) {
        const Run run = runs[at];
        Hash128 hash = hash128(run.chunks, (run.bytes + CHUNK - 1) / CHUNK * 8, lane);
        if (lane == 0) *run.checksum = hash;
    }
}
