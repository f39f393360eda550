// Gathers an engine's strided planes into packed blocks, and scatters packed blocks over them again.
#include "keepwarm.cuh"

// Rows of equal length, moved from one pitch to another: a gather where `to_pitch` is the row's length, a scatter where
// `from_pitch` is. 48 bytes.
struct Move {
    const u8 *from;
    u8 *to;
    u64 from_pitch; // from a row's first byte to the next row's
    u64 to_pitch;
    u64 bytes;      // of a row
    u64 rows;
};

// Bytes that a warp moves at a time: four loads of 16 bytes in flight for each thread.
#define PIECE 2048u

// Moves the rows of each of `count` moves. A warp takes pieces of rows, so that long rows are shared and short ones
// keep their neighbours' warps busy. Aligned ends and pitches go 16 bytes at a time, others byte by byte.
//
// Assumes that no target overlaps another move's source or target. A move without rows or bytes does nothing.
extern "C" __global__ void __launch_bounds__(THREADS) move_planes(const Move *moves, u32 count) {
    __shared__ Move move;
    u32 lane = threadIdx.x % WARP;
    for (u32 at = blockIdx.y; at < count; at += gridDim.y) {
        // Read once per block: the descriptors may lie behind a bus.
        if (threadIdx.x == 0) move = moves[at];
        __syncthreads();
        u64 per_row = (move.bytes + PIECE - 1) / PIECE, pieces = per_row * move.rows;
        u64 piece = (u64)blockIdx.x * WARPS + threadIdx.x / WARP;
        for (; piece < pieces; piece += (u64)gridDim.x * WARPS) {
            u64 row = piece / per_row, from = (piece - row * per_row) * PIECE;
            u64 bytes = min(move.bytes - from, (u64)PIECE);
            copy_by_warp(move.to + row * move.to_pitch + from, move.from + row * move.from_pitch + from, bytes, lane);
        }
        __syncthreads();
    }
}
