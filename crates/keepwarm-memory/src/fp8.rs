//! Planes of numbers as FP8 E4M3 with one scale each, and back: what a cold tier keeps of a KV cache.
//!
//! E4M3 is that of the OCP 8-bit Floating Point Specification (OFP8), revision 1.0: sign, four bits of exponent with a
//! bias of 7, three of mantissa; no infinities; 448 is the largest number, 2⁻⁹ the smallest, `S.1111.111` is NaN.
//!
//! A scale is the largest finite magnitude of its plane over 448, a code that of the number over the scale, and a
//! number is its code's value times the scale. Each of the three is one operation that IEEE 754 rounds, and all
//! conversions round to the nearest, ties to even; so `kernels/fp8.cu` gives the same bits on a GPU.

/// What a plane's numbers are, in little-endian bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Number {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper half of a binary32.
    Bf16,
}

/// The largest number of E4M3.
pub const E4M3_MAX: f32 = 448.0;

const SIGN: u32 = 1 << 31;
const INFINITE: u32 = 0x7f80_0000;
const NOT_A_NUMBER: u32 = 0x7fc0_0000;
const CODE_NAN: u32 = 0x7f;
const CODE_MAX: u32 = 0x7e;

/// A format with fewer bits than binary32, for rounding to it.
struct Narrow {
    /// Bits of the mantissa that go.
    dropped: u32,
    /// How much less the exponent's bias is.
    bias: u32,
    /// The bits of the smallest normal number.
    normal: u32,
    /// A number whose last place is worth the smallest number of the format.
    unit: f32,
}

const E4M3: Narrow = Narrow { dropped: 20, bias: 120, normal: 0x3c80_0000, unit: 16_384.0 };
const BINARY16: Narrow = Narrow { dropped: 13, bias: 112, normal: 0x3880_0000, unit: 0.5 };
/// Exponents are the same, and so are subnormal numbers.
const UPPER_HALF: Narrow = Narrow { dropped: 16, bias: 0, normal: 0, unit: 0.0 };

impl Narrow {
    /// Rounds a magnitude's bits to the nearest of the format, ties to even. What is too large comes out as the bits
    /// behind the largest exponent.
    fn round(&self, magnitude: u32) -> u32 {
        if magnitude < self.normal {
            // The sum's last place is where the format ends, so the addition rounds.
            return (f32::from_bits(magnitude) + self.unit).to_bits() - self.unit.to_bits();
        }
        let even = (1 << (self.dropped - 1)) - 1 + (magnitude >> self.dropped & 1);
        ((magnitude + even) >> self.dropped) - (self.bias << (23 - self.dropped))
    }
}

/// The code of the nearest number: at most 448, NaN for NaN.
#[must_use]
pub fn encode(number: f32) -> u8 {
    let (sign, magnitude) = (number.to_bits() >> 24 & 0x80, number.to_bits() & !SIGN);
    let code = match magnitude {
        _ if magnitude > INFINITE => CODE_NAN,
        _ if magnitude >= E4M3_MAX.to_bits() => CODE_MAX,
        _ => E4M3.round(magnitude),
    };
    (sign | code) as u8
}

/// A code's number, exactly.
#[must_use]
pub fn decode(code: u8) -> f32 {
    let (sign, magnitude) = (u32::from(code & 0x80) << 24, u32::from(code & 0x7f));
    let bits = match magnitude {
        CODE_NAN => NOT_A_NUMBER,
        0..8 => (magnitude as f32 / 512.0).to_bits(),
        _ => (magnitude << 20) + (120 << 23),
    };
    f32::from_bits(sign | bits)
}

impl Number {
    /// Bytes of one.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// The number whose bytes these are; binary32 holds each of them.
    fn read(self, bytes: &[u8]) -> f32 {
        let half = || u32::from(u16::from_le_bytes([bytes[0], bytes[1]]));
        match self {
            Self::F32 => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
            Self::Bf16 => f32::from_bits(half() << 16),
            Self::F16 => {
                let (sign, magnitude) = ((half() & 0x8000) << 16, half() & 0x7fff);
                let bits = match magnitude {
                    0x7c00.. => INFINITE | (magnitude & 0x3ff) << 13,
                    0..0x400 => (magnitude as f32 / 16_777_216.0).to_bits(),
                    _ => (magnitude << 13) + (112 << 23),
                };
                f32::from_bits(sign | bits)
            }
        }
    }

    /// Writes the nearest number, ties to even.
    fn write(self, number: f32, bytes: &mut [u8]) {
        let (sign, magnitude) = (number.to_bits() >> 16 & 0x8000, number.to_bits() & !SIGN);
        let half = match self {
            Self::F32 => return bytes.copy_from_slice(&number.to_le_bytes()),
            Self::Bf16 => UPPER_HALF.round(magnitude),
            Self::F16 if magnitude > INFINITE => 0x7e00,
            // From half a place behind the largest number on.
            Self::F16 if magnitude >= 0x477f_f000 => 0x7c00,
            Self::F16 => BINARY16.round(magnitude),
        };
        bytes.copy_from_slice(&((sign | half) as u16).to_le_bytes());
    }
}

/// Writes a plane's codes and tells its scale. An infinite number becomes the largest code of its sign; a plane
/// without finite numbers other than zero has the least scale, the smallest normal number.
///
/// # Panics
/// If there is not a code for each number.
pub fn quantise(kind: Number, numbers: &[u8], codes: &mut [u8]) -> f32 {
    assert_eq!(numbers.len(), codes.len() * kind.bytes(), "a code for each number");
    let numbers = || numbers.chunks_exact(kind.bytes()).map(|bytes| kind.read(bytes));
    let finite = numbers().map(f32::abs).filter(|magnitude| magnitude.is_finite());
    let scale = (finite.fold(0.0, f32::max) / E4M3_MAX).max(f32::MIN_POSITIVE);
    for (number, code) in numbers().zip(codes) {
        // A NaN's quotient might lose its sign.
        *code = encode(if number.is_nan() { number } else { number / scale });
    }
    scale
}

/// Writes a plane's numbers; one that would be larger than any finite number becomes the largest.
///
/// # Panics
/// If there is not a code for each number.
pub fn dequantise(kind: Number, codes: &[u8], scale: f32, numbers: &mut [u8]) {
    assert_eq!(numbers.len(), codes.len() * kind.bytes(), "a code for each number");
    for (code, bytes) in codes.iter().zip(numbers.chunks_exact_mut(kind.bytes())) {
        let value = decode(*code);
        // A NaN's bits are what the format says, not what a product makes of them.
        let number = if value.is_nan() { value } else { (value * scale).clamp(f32::MIN, f32::MAX) };
        kind.write(number, bytes);
    }
}

/// Bytes of a plane's scale in a stored block: a little-endian binary32.
const SCALE_BYTES: usize = 4;

/// What a block in plane order is, for its way to a cold tier and back.
///
/// Raw, it is `planes` rows of equally many numbers. Stored, it is a scale for each plane, then each plane's codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// What the numbers are.
    pub number: Number,
    /// Planes of the block.
    pub planes: usize,
}

impl Shape {
    /// Numbers of each plane of a block of so many raw bytes; none where they are no whole number for each.
    #[must_use]
    pub const fn numbers(&self, raw: usize) -> Option<usize> {
        match self.planes.checked_mul(self.number.bytes()) {
            Some(column @ 1..) if raw.is_multiple_of(column) => Some(raw / column),
            _ => None,
        }
    }

    /// Stored bytes of a block whose planes have so many numbers.
    #[must_use]
    pub const fn stored_bytes(&self, numbers: usize) -> usize {
        self.planes * (SCALE_BYTES + numbers)
    }

    /// Numbers of each plane of a block of so many stored bytes; none where no block has so many.
    #[must_use]
    pub const fn numbers_stored(&self, stored: usize) -> Option<usize> {
        match stored.checked_sub(self.planes * SCALE_BYTES) {
            Some(codes) if self.planes > 0 && codes.is_multiple_of(self.planes) => Some(codes / self.planes),
            _ => None,
        }
    }

    /// Raw bytes of a block whose planes have so many numbers.
    #[must_use]
    pub const fn raw_bytes(&self, numbers: usize) -> usize {
        self.planes * numbers * self.number.bytes()
    }

    /// Where the codes begin in a stored block.
    #[must_use]
    pub const fn codes_at(&self) -> usize {
        self.planes * SCALE_BYTES
    }
}

/// The stored form of a raw block; none where its bytes are not that shape's.
#[must_use]
pub fn quantise_block(shape: &Shape, raw: &[u8]) -> Option<Vec<u8>> {
    let numbers = shape.numbers(raw.len())?;
    let mut stored = vec![0; shape.stored_bytes(numbers)];
    let (scales, codes) = stored.split_at_mut(shape.codes_at());
    if numbers > 0 {
        let planes = raw.chunks_exact(numbers * shape.number.bytes()).zip(codes.chunks_exact_mut(numbers));
        for ((plane, codes), scale) in planes.zip(scales.chunks_exact_mut(SCALE_BYTES)) {
            scale.copy_from_slice(&quantise(shape.number, plane, codes).to_le_bytes());
        }
    }
    Some(stored)
}

/// The raw form of a stored block; none where its bytes are not that shape's.
#[must_use]
pub fn dequantise_block(shape: &Shape, stored: &[u8]) -> Option<Vec<u8>> {
    let numbers = shape.numbers_stored(stored.len())?;
    let mut raw = vec![0; shape.raw_bytes(numbers)];
    let (scales, codes) = stored.split_at(shape.codes_at());
    if numbers > 0 {
        let planes = codes.chunks_exact(numbers).zip(raw.chunks_exact_mut(numbers * shape.number.bytes()));
        for ((codes, plane), scale) in planes.zip(scales.chunks_exact(SCALE_BYTES)) {
            let scale = f32::from_le_bytes([scale[0], scale[1], scale[2], scale[3]]);
            dequantise(shape.number, codes, scale, plane);
        }
    }
    Some(raw)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, prop, proptest};

    use super::*;

    #[test]
    fn known_numbers_have_their_codes() {
        let codes = [
            (0.0, 0x00),
            (-0.0, 0x80),
            (1.0, 0x38),
            (-2.0, 0xc0),
            (448.0, 0x7e),
            (449.0, 0x7e),
            (1e30, 0x7e),
            (f32::INFINITY, 0x7e),
            (f32::NEG_INFINITY, 0xfe),
            (0.015_625, 0x08),       // 2^-6, the smallest normal number
            (0.013_671_875, 0x07),   // 7 * 2^-9, the largest subnormal one
            (0.001_953_125, 0x01),   // 2^-9
            (0.000_976_562_5, 0x00), // 2^-10, a tie: to even, which is zero
            (0.000_976_562_6, 0x01), // just above it
            (0.002_929_687_5, 0x02), // 1.5 * 2^-9, a tie: to even
            (0.014_648_437_5, 0x08), // 7.5 * 2^-9, a tie that becomes normal
            (1.0625, 0x38),          // between 1 and 1.125: to even
            (1.1875, 0x3a),          // between 1.125 and 1.25: to even
            (432.0, 0x7e),           // between 416 and 448: to even
            (-400.0, 0xfc),          // between -384 and -416: to even
        ];
        for (number, code) in codes {
            assert_eq!(encode(number), code, "{number}");
        }
        assert!(decode(encode(f32::NAN)).is_nan() && encode(-f32::NAN) == 0xff && encode(f32::NAN) == 0x7f);
    }

    #[test]
    fn every_code_is_its_numbers_code() {
        for code in 0..=u8::MAX {
            let number = decode(code);
            assert_eq!(encode(number), code, "{number}");
            assert_eq!(number.is_nan(), code & 0x7f == 0x7f);
        }
        assert_eq!((decode(0x01), decode(0x7e), decode(0x08)), (2f32.powi(-9), 448.0, 2f32.powi(-6)));
    }

    #[test]
    fn every_half_is_read_and_written_alike() {
        for kind in [Number::F16, Number::Bf16] {
            for bits in 0..=u16::MAX {
                let (number, mut back) = (kind.read(&bits.to_le_bytes()), [0; 2]);
                kind.write(number, &mut back);
                let exponent = if kind == Number::F16 { 0x7c00 } else { 0x7f80 };
                assert_eq!(number.is_nan(), bits & 0x7fff > exponent);
                if !number.is_nan() {
                    assert_eq!(u16::from_le_bytes(back), bits, "{kind:?} {number}");
                }
            }
        }
        let half = |number: f32, kind: Number| {
            let mut bytes = [0; 2];
            kind.write(number, &mut bytes);
            u16::from_le_bytes(bytes)
        };
        assert_eq!(
            [65_504.0, 65_519.0, 65_520.0, 1e9].map(|x| half(x, Number::F16)),
            [0x7bff, 0x7bff, 0x7c00, 0x7c00]
        );
        assert_eq!([1.5, 2f32.powi(-24), 2f32.powi(-25)].map(|x| half(x, Number::F16)), [0x3e00, 1, 0]);
        assert_eq!([1.0, f32::MAX, -f32::INFINITY].map(|x| half(x, Number::Bf16)), [0x3f80, 0x7f80, 0xff80]);
    }

    #[test]
    fn a_plane_of_nothing_finite_and_the_largest_numbers_come_through() {
        let plane = |numbers: &[f32]| {
            let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
            let mut codes = vec![0; numbers.len()];
            let scale = quantise(Number::F32, &bytes, &mut codes);
            let mut back = vec![0; bytes.len()];
            dequantise(Number::F32, &codes, scale, &mut back);
            let back: Vec<f32> = back.chunks_exact(4).map(|bytes| Number::F32.read(bytes)).collect();
            (scale, back)
        };
        assert_eq!(plane(&[0.0, -0.0]), (f32::MIN_POSITIVE, vec![0.0, 0.0]));
        let (scale, back) = plane(&[f32::INFINITY, f32::NAN, 0.0]);
        assert!(scale == f32::MIN_POSITIVE && back[0] == 448.0 * scale && back[1].is_nan());
        let (_, back) = plane(&[f32::MAX, f32::MIN, 0.0]);
        assert!(back.iter().all(|number| number.is_finite()) && back[0] >= f32::MAX / 1.0001, "{back:?}");
        assert_eq!(plane(&[1.0, -448.0, 3.0]), (1.0, vec![1.0, -448.0, 3.0]));
    }

    #[test]
    fn a_stored_block_is_scales_and_then_codes_and_other_lengths_are_refused() {
        let shape = Shape { number: Number::F32, planes: 2 };
        let raw: Vec<u8> =
            [448f32, 1.0, 0.0, -896.0, 2.0, 4.0].iter().flat_map(|x| x.to_le_bytes()).collect();
        let stored = quantise_block(&shape, &raw).unwrap();
        let scales: Vec<u8> = [1f32, 2.0].iter().flat_map(|scale| scale.to_le_bytes()).collect();
        assert_eq!((&stored[..8], &stored[8..]), (&scales[..], &[0x7e, 0x38, 0, 0xfe, 0x38, 0x40][..]));
        assert_eq!(dequantise_block(&shape, &stored).unwrap(), raw);
        for length in [7, 9, 23] {
            assert_eq!(
                (shape.numbers(length), dequantise_block(&shape, &stored[..length.min(9)])),
                (None, None)
            );
        }
        assert_eq!(quantise_block(&Shape { planes: 0, ..shape }, &[]), None);
        assert_eq!(quantise_block(&shape, &[]), Some(vec![0; 8]));
    }

    proptest! {
        #[test]
        fn what_came_back_of_halves_comes_back_the_same(
            bits in prop::collection::vec(any::<u16>(), 1..200),
            number in prop::sample::select(vec![Number::F16, Number::Bf16]),
        ) {
            let raw: Vec<u8> = bits.iter().flat_map(|bits| bits.to_le_bytes()).collect();
            let shape = Shape { number, planes: 1 };
            let once = dequantise_block(&shape, &quantise_block(&shape, &raw).unwrap()).unwrap();
            let twice = dequantise_block(&shape, &quantise_block(&shape, &once).unwrap()).unwrap();
            assert_eq!(once, twice);
        }

        #[test]
        fn a_code_is_the_nearest_and_even_where_two_are(bits in any::<u32>(), exponent in 115u32..137) {
            // Exponents around E4M3's: most random floats lie far outside.
            let number = f32::from_bits(bits & 0x807f_ffff | exponent << 23);
            let distance = |code: u8| (f64::from(decode(code)) - f64::from(number)).abs();
            let code = encode(number);
            for other in (0..=u8::MAX).filter(|other| other & 0x7f != 0x7f) {
                assert!(distance(code) < distance(other)
                    || decode(code) == decode(other)
                    || distance(code) == distance(other) && code.is_multiple_of(2), "{number}: {code} or {other}");
            }
        }

        #[test]
        fn numbers_come_back_within_half_a_place(
            numbers in prop::collection::vec(-1e4f32..1e4, 1..200),
            kind in prop::sample::select(vec![Number::F32, Number::F16, Number::Bf16]),
        ) {
            let mut bytes = vec![0; numbers.len() * kind.bytes()];
            for (number, bytes) in numbers.iter().zip(bytes.chunks_exact_mut(kind.bytes())) {
                kind.write(*number, bytes);
            }
            let mut codes = vec![0; numbers.len()];
            let scale = quantise(kind, &bytes, &mut codes);
            let mut back = vec![0; bytes.len()];
            dequantise(kind, &codes, scale, &mut back);
            for (before, after) in bytes.chunks_exact(kind.bytes()).zip(back.chunks_exact(kind.bytes())) {
                let (before, after) = (kind.read(before), kind.read(after));
                // Half a place of E4M3, 1/16, and of a bfloat16.
                let most = (before.abs() / 16.0).max(scale / 1024.0) * 1.01 + before.abs() / 256.0;
                assert!((before - after).abs() <= most, "{before} came back as {after}, scale {scale}");
            }
        }
    }
}
