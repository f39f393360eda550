//! A GGUF header walked once before it is believed: every length lies inside the file, every product fits.
//!
//! The reader that builds the values trusts lengths, and a damaged one would end the process.

/// Most dimensions of a tensor, as the format has it.
const DIMENSIONS_MAX: u32 = 4;
/// Most values of a tensor: 2^40, more than any file holds.
const VALUES_MAX: u64 = 1 << 40;
/// Largest alignment of tensors that is taken.
const ALIGNMENT_MAX: u64 = 1 << 20;
/// Arrays inside arrays: the format allows them, no model has more than one.
const DEPTH_MAX: u32 = 4;

const TYPE_U32: u32 = 4;
const TYPE_STRING: u32 = 8;
const TYPE_ARRAY: u32 = 9;

struct Walk<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Walk<'a> {
    fn take(&mut self, count: u64, what: &str) -> Result<&'a [u8], String> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let taken = usize::try_from(count).ok().and_then(|count| rest.get(..count));
        let taken = taken.ok_or_else(|| {
            format!(
                "byte {}: {what} of {count} bytes goes beyond the file's {}: it was cut short or is damaged",
                self.at,
                self.bytes.len()
            )
        })?;
        self.at += taken.len();
        Ok(taken)
    }

    fn u32(&mut self, what: &str) -> Result<u32, String> {
        let bytes = self.take(4, what)?;
        Ok(bytes.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte)))
    }

    fn u64(&mut self, what: &str) -> Result<u64, String> {
        let bytes = self.take(8, what)?;
        Ok(bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    }

    fn string(&mut self, what: &str) -> Result<&'a [u8], String> {
        let length = self.u64(what)?;
        self.take(length, what)
    }

    /// Bytes of a value of a fixed size.
    fn size(&self, kind: u32) -> Result<u64, String> {
        match kind {
            0 | 1 | 7 => Ok(1),
            2 | 3 => Ok(2),
            4..=6 => Ok(4),
            10..=12 => Ok(8),
            _ => Err(format!("byte {}: there is no value type {kind}", self.at)),
        }
    }

    fn value(&mut self, kind: u32, depth: u32) -> Result<(), String> {
        match kind {
            TYPE_STRING => self.string("a string").map(drop),
            TYPE_ARRAY if depth >= DEPTH_MAX => Err(format!("byte {}: arrays nest too deep", self.at)),
            TYPE_ARRAY => {
                let (kind, count) = (self.u32("an array's type")?, self.u64("an array's length")?);
                if kind != TYPE_STRING && kind != TYPE_ARRAY {
                    let bytes = count.saturating_mul(self.size(kind)?);
                    return self.take(bytes, "an array").map(drop);
                }
                // Each item takes eight bytes at least, so the walk ends with the file.
                (0..count).try_for_each(|_| self.value(kind, depth + 1))
            }
            _ => {
                let size = self.size(kind)?;
                self.take(size, "a value").map(drop)
            }
        }
    }

    fn tensor(&mut self) -> Result<(), String> {
        self.string("a tensor's name")?;
        let at = self.at;
        let dimensions = self.u32("a tensor's dimensions")?;
        if dimensions > DIMENSIONS_MAX {
            return Err(format!(
                "byte {at}: a tensor of {dimensions} dimensions; at most {DIMENSIONS_MAX} are known"
            ));
        }
        let mut values = 1u64;
        for _ in 0..dimensions {
            let length = self.u64("a tensor's shape")?;
            values = values
                .checked_mul(length)
                .filter(|values| *values <= VALUES_MAX)
                .ok_or_else(|| format!("byte {at}: a tensor has more values than a file can hold"))?;
        }
        self.u32("a tensor's type")?;
        let offset = self.u64("a tensor's place")?;
        if offset > self.bytes.len() as u64 {
            return Err(format!(
                "byte {at}: a tensor begins at {offset}, the file has {} bytes: it was cut short",
                self.bytes.len()
            ));
        }
        Ok(())
    }
}

/// Walks the header of a GGUF file of version 2 or 3.
pub(super) fn check(bytes: &[u8]) -> Result<(), String> {
    let mut walk = Walk { bytes, at: 0 };
    if walk.take(4, "the magic")? != b"GGUF" {
        return Err("it does not begin with GGUF".to_owned());
    }
    let version = walk.u32("the version")?;
    if !(2..=3).contains(&version) {
        return Err(format!("version {version} of the format is not known: 2 and 3 are"));
    }
    let (tensors, values) = (walk.u64("the number of tensors")?, walk.u64("the number of values")?);
    for _ in 0..values {
        let key = walk.string("a key")?;
        let (kind, at) = (walk.u32("a value's type")?, walk.at);
        walk.value(kind, 0)?;
        if key == b"general.alignment" {
            let mut again = Walk { bytes, at };
            let alignment = if kind == TYPE_U32 { u64::from(again.u32("the alignment")?) } else { 0 };
            if !alignment.is_power_of_two() || alignment > ALIGNMENT_MAX {
                return Err(format!("byte {at}: general.alignment is no power of two up to {ALIGNMENT_MAX}"));
            }
        }
    }
    (0..tensors).try_for_each(|_| walk.tensor())
}
