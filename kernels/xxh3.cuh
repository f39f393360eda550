// XXH3 with seed 0 and the default secret, 64 and 128 bits, written from its specification: Yann Collet,
// https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md, whose names of steps stand in the comments.
//
// Inputs are arrays of 64-bit words, little-endian as GPUs are; bytes behind the length may hold anything, and are read
// only within the last word.
//
// Inputs of up to `SHORT` bytes are hashed by each thread for itself. Longer ones take a whole warp: within a block of 1,024
// bytes, accumulators only ever add, so four stripes of eight lanes are read at once and their sums added up; the
// scrambling between blocks is what keeps blocks in order.
#pragma once
#include "keepwarm.cuh"

#define PRIME32_1 0x9e3779b1ull
#define PRIME32_2 0x85ebca77ull
#define PRIME32_3 0xc2b2ae3dull
#define PRIME64_1 0x9e3779b185ebca87ull
#define PRIME64_2 0xc2b2ae3d27d4eb4full
#define PRIME64_3 0x165667b19e3779f9ull
#define PRIME64_4 0x85ebca77c2b2ae63ull
#define PRIME64_5 0x27d4eb2f165667c5ull
#define PRIME_MX1 0x165667919e3779f9ull
#define PRIME_MX2 0x9fb21c651e98df25ull

// The longest input of the specification's "small" and "medium" classes.
#define SHORT 240u
// Eight-byte lanes of a stripe, stripes of a block.
#define STRIPE_WORDS 8u
#define BLOCK_STRIPES 16u
#define BLOCK_BYTES 1024u

// The default secret, in words.
__device__ const u64 SECRET[24] = {
    0xbe4ba423396cfeb8, 0x1cad21f72c81017c, 0xdb979083e96dd4de, 0x1f67b3b7a4a44072, 0x78e5c0cc4ee679cb, 0x2172ffcc7dd05a82,
    0x8e2443f7744608b8, 0x4c263a81e69035e0, 0xcb00c391bb52283c, 0xa32e531b8b65d088, 0x4ef90da297486471, 0xd8acdea946ef1938,
    0x3f349ce33f76faa8, 0x1d4f0bc7c7bbdcf9, 0x3159b4cd4be0518a, 0x647378d9c97e9fc8, 0xc3ebd33483acc5ea, 0xeb6313faffa081c5,
    0x49daf0b751dd0d17, 0x9e68d429265516d3, 0xfca1477d58be162b, 0xce31d07ad1b8f88f, 0x280416958f3acb45, 0x7e404bbbcafbd7af,
};

__device__ const u64 ACCUMULATORS[STRIPE_WORDS] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3,
                                                   PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};

struct Hash128 {
    u64 low, high;
};

// The eight bytes from any offset on. Without a branch, and without the word behind where there is no need of it: then the
// two shifts leave nothing of the second.
__device__ __forceinline__ u64 word_at(const u64 *words, u64 offset) {
    const u64 *word = words + offset / 8;
    u32 shift = (u32)(offset % 8) * 8;
    return word[0] >> shift | word[shift != 0] << 1 << (63 - shift);
}

__device__ __forceinline__ u64 rotate(u64 x, u32 by) { return x << by | x >> (64 - by); }

__device__ __forceinline__ u64 swap_bytes(u64 x) {
    return (u64)__byte_perm((u32)x, 0, 0x0123) << 32 | __byte_perm((u32)(x >> 32), 0, 0x0123);
}

// The halves of a 128-bit product, exclusive-ored.
__device__ __forceinline__ u64 fold(u64 a, u64 b) { return a * b ^ __umul64hi(a, b); }

__device__ __forceinline__ u64 avalanche(u64 x) {
    x = (x ^ x >> 37) * PRIME_MX1;
    return x ^ x >> 32;
}

__device__ __forceinline__ u64 avalanche_xxh64(u64 x) {
    x = (x ^ x >> 33) * PRIME64_2;
    x = (x ^ x >> 29) * PRIME64_3;
    return x ^ x >> 32;
}

// `mixStep`: two words of input with 16 bytes of the secret.
__device__ __forceinline__ u64 mix(u64 first, u64 second, u32 secret) {
    return fold(first ^ word_at(SECRET, secret), second ^ word_at(SECRET, secret + 8));
}

__device__ __forceinline__ u64 mix_at(const u64 *words, u32 at, u32 secret) {
    return mix(word_at(words, at), word_at(words, at + 8), secret);
}

// XXH3-64 of at most `SHORT` bytes.
__device__ __forceinline__ u64 short_hash64(const u64 *words, u32 length) {
    if (length == 0) return avalanche_xxh64(SECRET[7] ^ SECRET[8]);
    if (length <= 3) {
        u32 bytes = (u32)words[0], first = bytes & 255, middle = bytes >> 8 * (length / 2) & 255;
        u32 combined = (bytes >> 8 * (length - 1) & 255) | length << 8 | first << 16 | middle << 24;
        return avalanche_xxh64(((u32)SECRET[0] ^ (u32)(SECRET[0] >> 32)) ^ combined);
    }
    if (length <= 8) {
        u64 x = SECRET[1] ^ SECRET[2] ^ ((u64)(u32)words[0] << 32 | (u32)word_at(words, length - 4));
        x = (x ^ rotate(x, 49) ^ rotate(x, 24)) * PRIME_MX2;
        x = (x ^ ((x >> 35) + length)) * PRIME_MX2;
        return x ^ x >> 28;
    }
    if (length <= 16) {
        u64 low = SECRET[3] ^ SECRET[4] ^ words[0], high = SECRET[5] ^ SECRET[6] ^ word_at(words, length - 8);
        return avalanche(length + swap_bytes(low) + high + fold(low, high));
    }
    u64 sum = length * PRIME64_1;
    if (length <= 128) {
        for (u32 i = 0; i <= (length - 1) / 32; i++) {
            sum += mix_at(words, 16 * i, 32 * i) + mix_at(words, length - 16 * i - 16, 32 * i + 16);
        }
        return avalanche(sum);
    }
    for (u32 i = 0; i < 8; i++) sum += mix_at(words, 16 * i, 16 * i);
    sum = avalanche(sum);
    for (u32 i = 8; i < length / 16; i++) sum += mix_at(words, 16 * i, 16 * (i - 8) + 3);
    return avalanche(sum + mix_at(words, length - 16, 119));
}

// `mixTwoChunks`: two words from each of two places with 32 bytes of the secret.
__device__ __forceinline__ void mix_two(Hash128 &sums, const u64 *one, const u64 *other, u32 secret) {
    sums.low = (sums.low + mix(one[0], one[1], secret)) ^ (other[0] + other[1]);
    sums.high = (sums.high + mix(other[0], other[1], secret + 16)) ^ (one[0] + one[1]);
}

// XXH3-128 of at most `SHORT` bytes, a multiple of eight: the lists that are hashed here have no other lengths.
__device__ __forceinline__ Hash128 short_hash128(const u64 *words, u32 length) {
    if (length == 0) return {avalanche_xxh64(SECRET[8] ^ SECRET[9]), avalanche_xxh64(SECRET[10] ^ SECRET[11])};
    if (length == 8) {
        u64 x = SECRET[2] ^ SECRET[3] ^ words[0], factor = PRIME64_1 + (8 << 2);
        u64 low = x * factor, high = __umul64hi(x, factor) + (low << 1);
        low ^= high >> 3;
        low = (low ^ low >> 35) * PRIME_MX2;
        return {low ^ low >> 28, avalanche(high)};
    }
    if (length == 16) {
        u64 x = SECRET[4] ^ SECRET[5] ^ words[0] ^ words[1], y = SECRET[6] ^ SECRET[7] ^ words[1];
        u64 low = x * PRIME64_1 + (15ull << 54);
        u64 high = __umul64hi(x, PRIME64_1) + y + (u64)(u32)y * (PRIME32_2 - 1);
        low ^= swap_bytes(high);
        high = __umul64hi(low, PRIME64_2) + high * PRIME64_2;
        return {avalanche(low * PRIME64_2), avalanche(high)};
    }
    const u64 *end = words + length / 8;
    Hash128 sums = {length * PRIME64_1, 0};
    if (length <= 128) {
        for (u32 i = (length - 1) / 32 + 1; i-- > 0;) mix_two(sums, words + 2 * i, end - 2 * i - 2, 32 * i);
    } else {
        for (u32 i = 0; i < 4; i++) mix_two(sums, words + 4 * i, words + 4 * i + 2, 32 * i);
        sums = {avalanche(sums.low), avalanche(sums.high)};
        for (u32 i = 4; i < length / 32; i++) mix_two(sums, words + 4 * i, words + 4 * i + 2, 32 * (i - 4) + 3);
        mix_two(sums, end - 2, end - 4, 103);
    }
    u64 high = sums.low * PRIME64_1 + sums.high * PRIME64_4 + length * PRIME64_2;
    return {avalanche(sums.low + sums.high), 0 - avalanche(high)};
}

// The product that a word and its secret give to their lane's accumulator.
__device__ __forceinline__ u64 product(u64 keyed) { return (u64)(u32)keyed * (u32)(keyed >> 32); }

// What up to `BLOCK_STRIPES` stripes add to this thread's lane, `thread % 8`: the warp's four groups of eight threads take
// every fourth stripe, and each ends with the sum of all.
__device__ __forceinline__ u64 sum_of_stripes(const u64 *words, u32 stripes, u32 thread) {
    u32 lane = thread % STRIPE_WORDS;
    u64 products = 0, values = 0;
#pragma unroll
    for (u32 i = 0; i < BLOCK_STRIPES; i += WARP / STRIPE_WORDS) {
        u32 stripe = i + thread / STRIPE_WORDS;
        if (stripe < stripes) {
            u64 value = words[stripe * STRIPE_WORDS + lane];
            values += value;
            products += product(value ^ SECRET[stripe + lane]);
        }
    }
    // A lane's words themselves go to its neighbour.
    u64 sum = products + __shfl_xor_sync(ALL_LANES, values, 1);
    sum += __shfl_xor_sync(ALL_LANES, sum, 8);
    return sum + __shfl_xor_sync(ALL_LANES, sum, 16);
}

// The accumulators of more than `SHORT` bytes, one for each lane; by a warp together.
__device__ __forceinline__ u64 accumulate(const u64 *words, u64 length, u32 thread) {
    u32 lane = thread % STRIPE_WORDS;
    u64 sum = ACCUMULATORS[lane], blocks = (length - 1) / BLOCK_BYTES;
    for (u64 block = 0; block < blocks; block++, words += BLOCK_BYTES / 8) {
        sum += sum_of_stripes(words, BLOCK_STRIPES, thread);
        sum = (sum ^ sum >> 47 ^ SECRET[16 + lane]) * PRIME32_1;
    }
    // What is left is 1 to 1,024 bytes; the last stripe is the input's last 64, wherever they begin.
    long long left = (long long)(length - blocks * BLOCK_BYTES);
    sum += sum_of_stripes(words, (u32)(left - 1) / 64, thread);
    long long last = left - 64 + 8 * (long long)lane;
    u64 value = word_at(words + (last >> 3), (u64)last & 7);
    return sum + product(value ^ word_at(SECRET, 121 + 8 * lane)) + __shfl_xor_sync(ALL_LANES, value, 1);
}

// `finalMerge`, by a warp together.
__device__ __forceinline__ u64 merge(u64 sum, u64 initial, u32 secret, u32 thread) {
    u64 keyed = sum ^ word_at(SECRET, secret + 8 * (thread % STRIPE_WORDS));
    u64 folded = fold(keyed, __shfl_xor_sync(ALL_LANES, keyed, 1));
    folded += __shfl_xor_sync(ALL_LANES, folded, 2);
    return avalanche(initial + folded + __shfl_xor_sync(ALL_LANES, folded, 4));
}

// XXH3-64 and XXH3-128 (of a multiple of eight bytes), by a warp together; each thread gets the result.
__device__ __forceinline__ u64 hash64(const u64 *words, u32 length, u32 thread) {
    if (length <= SHORT) return short_hash64(words, length);
    return merge(accumulate(words, length, thread), length * PRIME64_1, 11, thread);
}

__device__ __forceinline__ Hash128 hash128(const u64 *words, u64 length, u32 thread) {
    if (length <= SHORT) return short_hash128(words, (u32)length);
    u64 sum = accumulate(words, length, thread);
    u64 low = merge(sum, length * PRIME64_1, 11, thread);
    return {low, merge(sum, ~(length * PRIME64_2), 117, thread)};
}
