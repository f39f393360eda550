// Kernels of softcuda's own tests.
#include <cuda_fp16.h>

extern "C" __global__ void add(const float *a, const float *b, float *c, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) c[i] = a[i] + b[i];
}

// Grid-stride, shared memory, barriers, shuffles, one atomic per block.
extern "C" __global__ void __launch_bounds__(256) total(const unsigned *in, unsigned *out, unsigned n) {
    __shared__ unsigned part[256];
    unsigned t = threadIdx.x, sum = 0;
    for (unsigned i = blockIdx.x * blockDim.x + t; i < n; i += gridDim.x * blockDim.x) sum += in[i];
    part[t] = sum;
    __syncthreads();
    for (unsigned half = blockDim.x / 2; half >= warpSize; half /= 2) {
        if (t < half) part[t] += part[t + half];
        __syncthreads();
    }
    if (t >= warpSize) return;
    unsigned value = part[t];
    for (int step = warpSize / 2; step > 0; step /= 2) value += __shfl_down_sync(0xffffffffu, value, step);
    if (t == 0) atomicAdd(out, value);
}

extern "C" {
__global__ void warps(unsigned *out) {
    unsigned t = threadIdx.x, *own = out + t * 6;
    own[0] = __shfl_sync(0xffffffffu, t, (t + 31) % 32);
    own[1] = __shfl_xor_sync(0xffffffffu, t, 5);
    own[2] = __shfl_down_sync(0xffffffffu, t, 1, 8);
    own[3] = __ballot_sync(0xffffffffu, t % 4 == 0);
    own[4] = __syncthreads_count(t % 4 == 0);
    own[5] = __all_sync(0xffffffffu, t < 32);
}

__global__ void dynamic(unsigned *out) {
    extern __shared__ unsigned words[];
    unsigned t = threadIdx.x;
    words[t] = blockIdx.x * blockDim.x + t;
    __syncthreads();
    out[blockIdx.x * blockDim.x + t] = words[blockDim.x - 1 - t];
}
}

extern "C" __global__ void places(unsigned *out) {
    out[blockIdx.x * blockDim.x + threadIdx.x] =
        blockIdx.x * 1000000 + threadIdx.x * 1000 + gridDim.x * 100 + blockDim.x;
}

// Each thread adds one to its own place in a cube of blocks of cubes.
extern "C" __global__ void cube(unsigned *out) {
    unsigned x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y,
             z = blockIdx.z * blockDim.z + threadIdx.z;
    out[(z * gridDim.y * blockDim.y + y) * gridDim.x * blockDim.x + x] += 1;
}

struct Factors {
    float a;
    unsigned long long b[4];
};
extern "C" __global__ void scale(Factors factors, float *out) { *out = factors.a * (float)factors.b[3]; }

extern "C" __global__ void halves(unsigned *out) {
    out[0] = __half_as_ushort(__float2half(1.5f));
    out[1] = (unsigned)(__half2float(__ushort_as_half(0x4200)));
}

// Shared memory between the threads of a warp, and atomics of all: in order without a barrier of the block.
extern "C" __global__ void warpwise(unsigned *out) {
    __shared__ unsigned kept[64];
    __shared__ unsigned total;
    unsigned t = threadIdx.x;
    if (t == 0) total = 0;
    __syncthreads();
    kept[t] = t;
    __syncwarp();
    unsigned other = kept[t ^ 1];
    __syncwarp();
    kept[t] = other;
    atomicAdd(&total, other);
    __syncthreads();
    out[t] = t == 0 ? total : kept[t];
}

// ---- what goes wrong

// A barrier of the warp where one of the block is needed.
extern "C" __global__ void halfhearted(unsigned *out) {
    extern __shared__ unsigned words[];
    words[threadIdx.x] = threadIdx.x;
    __syncwarp();
    out[threadIdx.x] = words[threadIdx.x ^ 32];
}
extern "C" __global__ void mixes(unsigned *out) {
    __shared__ unsigned total;
    atomicExch(&total, 0u);
    out[threadIdx.x] = total;
}

extern "C" __global__ void hangs(unsigned *out) {
    if (threadIdx.x < 32 || threadIdx.x == 40) {
        __syncthreads();
    } else {
        __syncwarp();
    }
    out[threadIdx.x] = 1;
}
extern "C" __global__ void asserts(unsigned *) { assert(blockDim.x == 1); }
extern "C" __global__ void traps(unsigned *) { __trap(); }
extern "C" __global__ void misaligned(unsigned *out) {
    *(volatile unsigned *)((char *)out + 2) = 1;
}
extern "C" __global__ void quarrels(unsigned *out) {
    out[threadIdx.x] = threadIdx.x % 32 == 3 ? __any_sync(0xffffffffu, 1) : __ballot_sync(0xffffffffu, 1);
}
extern "C" __global__ void oversteps(unsigned *out) {
    __shared__ unsigned kept[32];
    kept[threadIdx.x] = 1;
    __syncthreads();
    out[threadIdx.x] = kept[threadIdx.x];
}
extern "C" __global__ void unwritten(unsigned *out) {
    __shared__ unsigned kept[2];
    volatile unsigned *words = kept;
    out[blockIdx.x * 2] = words[0];
    out[blockIdx.x * 2 + 1] = words[1];
    words[0] = words[1] = 7;
}
// There is no barrier between the write and the read of another thread's.
extern "C" __global__ void forgets(unsigned *out) {
    __shared__ unsigned kept[64];
    volatile unsigned *words = kept;
    unsigned t = threadIdx.x;
    words[t] = t;
    out[t] = words[t == 0 ? 0 : t - 1];
}

// Ends when the host writes a one, which nobody does.
extern "C" __global__ void spins(unsigned *flag) {
    while (*(volatile unsigned *)flag != 1) {
    }
}

// ---- for two streams at once

extern "C" __global__ void set(unsigned *out, unsigned value) { out[threadIdx.x] = value; }
extern "C" __global__ void count(unsigned *out) { atomicAdd(out, 1u); }
