// What the kernels share: short names, and bytes copied by a warp.
//
// All kernels take an array of descriptors and its length, and serve all of them in one launch: `blockIdx.y` strides over
// the descriptors, `blockIdx.x` over the parts of one. Descriptors lie in page-locked or device memory, 16-byte
// aligned; addresses, sizes and pitches are 64 bits wide and in bytes where nothing else is said. Blocks have `THREADS`
// threads. Any grid is right; the launcher's choice is about speed alone.
//
// The same text is compiled by NVRTC to PTX and by g++ for softcuda, so it uses no header of CUDA's.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define WARP 32u
#define THREADS 256u
#define WARPS (THREADS / WARP)
#define ALL_LANES 0xffffffffu

// Copies `bytes` bytes, by the 32 threads of a warp together: 16 at a time where both ends are aligned, then the rest
// singly. The ends must not overlap.
__device__ __forceinline__ void copy_by_warp(u8 *__restrict__ to, const u8 *__restrict__ from, u64 bytes, u32 lane) {
    u64 vectors = ((u64)to | (u64)from) % sizeof(uint4) == 0 ? bytes / sizeof(uint4) : 0;
#pragma unroll 4
    for (u64 i = lane; i < vectors; i += WARP) ((uint4 *)to)[i] = ((const uint4 *)from)[i];
    for (u64 i = vectors * sizeof(uint4) + lane; i < bytes; i += WARP) to[i] = from[i];
}
