// Planes of numbers as FP8 E4M3 with one scale each, and back: OCP 8-bit Floating Point Specification (OFP8), revision 1.0.
//
// Bit for bit what crates/keepwarm-memory/src/fp8.rs does on a CPU, for these reasons:
// - the largest magnitude is a maximum of integers, the bits of finite magnitudes, so that the order does not matter;
// - every float operation is one division, product or sum that IEEE 754 rounds correctly, and subnormal numbers are kept:
//   compiled with --fmad=false, --prec-div=true and --ftz=false; there is a division by the scale and no product with
//   its inverse;
// - conversions are integer operations that are written here, and NaNs are chosen here, not by the hardware.
#include "keepwarm.cuh"

// The planes of a block, one after another. 40 bytes.
struct Planes {
    u8 *numbers;   // aligned to a number
    u8 *codes;     // one for each number
    float *scales; // one for each plane: a number is its code's value times this
    u64 count;     // numbers of a plane
    u32 planes;
    u32 kind;      // what the numbers are
};

// What numbers are: IEEE binary32, binary16, or the upper half of a binary32.
#define F32 0u
#define F16 1u
#define BF16 2u

// Bytes of a number.
__device__ __forceinline__ u64 width(u32 kind) { return kind == F32 ? 4 : 2; }

#define SIGN 0x80000000u
#define INFINITE 0x7f800000u
#define NOT_A_NUMBER 0x7fc00000u
// The largest finite number; the smallest normal one, which is the least that a scale can be.
#define FINITE_MAX 0x7f7fffffu
#define SCALE_MIN 0x00800000u
// E4M3: no infinities, one NaN of each sign, 448 at most, 2^-6 as the smallest normal number.
#define CODE_NAN 0x7fu
#define CODE_MAX 0x7eu
#define E4M3_MAX 448.0f

// Bits of a binary32 rounded to a format with fewer: `dropped` bits of the mantissa go, to the nearest, ties to even. The
// exponent is counted from `bias` less. Below `normal`, the format's smallest normal number, adding `unit`, whose last
// place is worth the format's smallest number, rounds to a multiple of that.
__device__ __forceinline__ u32 narrow(u32 magnitude, u32 dropped, u32 bias, u32 normal, float unit) {
    if (magnitude < normal) return __float_as_uint(__uint_as_float(magnitude) + unit) - __float_as_uint(unit);
    return ((magnitude + ((1u << (dropped - 1)) - 1) + (magnitude >> dropped & 1)) >> dropped) - (bias << (23 - dropped));
}

// The code of the nearest number, ties to even; 448 for what is larger, NaN for NaN.
__device__ __forceinline__ u32 encode(u32 bits) {
    u32 sign = (bits & SIGN) >> 24, magnitude = bits & ~SIGN;
    if (magnitude > INFINITE) return sign | CODE_NAN;
    if (magnitude >= __float_as_uint(E4M3_MAX)) return sign | CODE_MAX;
    return sign | narrow(magnitude, 20, 120, 0x3c800000u, 16384.0f);
}

// A code's number, times the scale; the largest finite number where that is too large.
__device__ __forceinline__ u32 decode(u32 code, float scale) {
    u32 sign = (code & 0x80) << 24, magnitude = code & 0x7f;
    if (magnitude == CODE_NAN) return sign | NOT_A_NUMBER;
    float value = magnitude < 8 ? magnitude * 0.001953125f : __uint_as_float((magnitude << 20) + (120u << 23));
    return sign | min(__float_as_uint(value * scale), FINITE_MAX);
}

// A number of a plane, as the bits of a binary32, which is exact.
__device__ __forceinline__ u32 load(const void *numbers, u64 at, u32 kind) {
    if (kind == F32) return ((const u32 *)numbers)[at];
    u32 half = ((const u16 *)numbers)[at];
    if (kind == BF16) return half << 16;
    u32 sign = (half & 0x8000) << 16, magnitude = half & 0x7fff;
    if (magnitude >= 0x7c00) return sign | INFINITE | (magnitude & 0x3ff) << 13;
    if (magnitude < 0x400) return sign | __float_as_uint(magnitude * 5.9604644775390625e-8f);
    return sign | ((magnitude << 13) + (112u << 23));
}

// Stores a number of a plane, rounded to the nearest, ties to even.
__device__ __forceinline__ void store(void *numbers, u64 at, u32 kind, u32 bits) {
    u32 sign = (bits & SIGN) >> 16, magnitude = bits & ~SIGN, half;
    if (kind == F32) {
        ((u32 *)numbers)[at] = bits;
        return;
    }
    if (kind == BF16) half = narrow(magnitude, 16, 0, 0, 0.0f);
    else if (magnitude > INFINITE) half = 0x7e00;
    else if (magnitude >= 0x477ff000u) half = 0x7c00;
    else half = narrow(magnitude, 13, 112, 0x38800000u, 0.5f);
    ((u16 *)numbers)[at] = (u16)(sign | half);
}

// Writes the scales and the codes of the planes of each of `count` blocks: a scale is the largest finite magnitude of its plane
// over 448, and a code is that of the number over the scale. A block of threads takes a plane at a time, whatever the grid's
// shape.
//
// Assumes that planes do not overlap. An infinite number becomes the largest code.
extern "C" __global__ void __launch_bounds__(THREADS) quantise(const Planes *blocks, u32 count) {
    __shared__ u32 largest;
    for (u32 at = blockIdx.y; at < count; at += gridDim.y) {
        const Planes block = blocks[at];
        for (u32 plane = blockIdx.x; plane < block.planes; plane += gridDim.x) {
            const u8 *numbers = block.numbers + plane * block.count * width(block.kind);
            u8 *codes = block.codes + plane * block.count;
            if (threadIdx.x == 0) largest = 0;
            __syncthreads();
            u32 own = 0;
            for (u64 i = threadIdx.x; i < block.count; i += THREADS) {
                u32 magnitude = load(numbers, i, block.kind) & ~SIGN;
                own = max(own, magnitude < INFINITE ? magnitude : 0);
            }
            for (u32 step = WARP / 2; step > 0; step /= 2) own = max(own, __shfl_xor_sync(ALL_LANES, own, step));
            if (threadIdx.x % WARP == 0) atomicMax(&largest, own);
            __syncthreads();
            float scale = __uint_as_float(max(__float_as_uint(__uint_as_float(largest) / E4M3_MAX), SCALE_MIN));
            for (u64 i = threadIdx.x; i < block.count; i += THREADS) {
                u32 bits = load(numbers, i, block.kind);
                // A quotient would lose a NaN's sign.
                if ((bits & ~SIGN) <= INFINITE) bits = __float_as_uint(__uint_as_float(bits) / scale);
                codes[i] = (u8)encode(bits);
            }
            if (threadIdx.x == 0) block.scales[plane] = scale;
            __syncthreads();
        }
    }
}

// Writes the numbers of the planes of each of `count` blocks from their codes and scales. A block of threads takes a plane at a
// time.
//
// Assumes that planes do not overlap.
extern "C" __global__ void __launch_bounds__(THREADS) dequantise(const Planes *blocks, u32 count) {
    for (u32 at = blockIdx.y; at < count; at += gridDim.y) {
        const Planes block = blocks[at];
        for (u32 plane = blockIdx.x; plane < block.planes; plane += gridDim.x) {
            u8 *numbers = block.numbers + plane * block.count * width(block.kind);
            const u8 *codes = block.codes + plane * block.count;
            float scale = block.scales[plane];
            for (u64 i = threadIdx.x; i < block.count; i += THREADS) {
                store(numbers, i, block.kind, decode(codes[i], scale));
            }
        }
    }
}
