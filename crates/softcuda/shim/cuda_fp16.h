// The part of CUDA's cuda_fp16.h that softcuda has: storage and conversions of `__half`, by the compiler's own type.
#pragma once

struct __half {
    _Float16 value;
};
using half = __half;

static inline __half __float2half_rn(float x) { return {(_Float16)x}; }
static inline __half __float2half(float x) { return {(_Float16)x}; }
static inline float __half2float(__half x) { return (float)x.value; }
static inline unsigned short __half_as_ushort(__half x) {
    unsigned short bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return bits;
}
static inline __half __ushort_as_half(unsigned short bits) {
    __half x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
}
