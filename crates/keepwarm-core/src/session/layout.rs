//! What a session's bytes are: an immutable description, compared by hash.

use std::fmt;
use std::sync::Arc;

use keepwarm_types::{Bytes, LayoutHash, Tokens, valid_name};

use super::cold::{Fp8, Number};

/// Most parts in one layout: one per rank of a 64-GPU tensor-parallel group, twice.
pub const PARTS_MAX: usize = 128;
/// Block size of a `bytes` part that does not name one.
pub const BLOCK_BYTES_DEFAULT: u64 = 1 << 20;
/// Largest block: one extent of the default arena (64 MiB), so that a block never spans extents.
pub const BLOCK_BYTES_MAX: u64 = 64 << 20;
/// Most tokens in one block.
pub const TOKENS_PER_BLOCK_MAX: u32 = 4096;
/// Most planes: layers x K/V x head groups.
const PLANES_MAX: u32 = 65_536;
/// Largest snapshot: 64 GiB, more than any recurrent state in use.
const SNAPSHOT_BYTES_MAX: u64 = 64 << 30;
/// A `snapshot` is kept in blocks of this size.
const SNAPSHOT_BLOCK_BYTES: u64 = 1 << 20;
/// Longest model name or fingerprint, in bytes.
const TEXT_BYTES_MAX: usize = 256;

/// The name of a part within its layout.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PartName(Arc<str>);

impl PartName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for PartName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl std::str::FromStr for PartName {
    type Err = LayoutError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if valid_name(text) {
            Ok(Self(text.into()))
        } else {
            Err(LayoutError::new(
                "parts.name",
                format!("'{text}' is not a name: 1 to 64 letters, digits, '.', '_' or '-'"),
            ))
        }
    }
}

/// In which order a paged part's bytes lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Order {
    /// Tokens one after another, each with all its planes.
    Token,
    /// Blocks one after another, each plane by plane, the last with just its valid tokens.
    Plane,
}

/// The geometry of a paged part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Planes {
    /// Tokens in a full block.
    pub tokens_per_block: u32,
    /// Planes: layers x K/V x head groups.
    pub planes: u32,
    /// Bytes of one token in one plane.
    pub plane_bytes_per_token: u32,
    /// How the bytes lie.
    pub order: Order,
}

impl Planes {
    /// Bytes of one token over all planes.
    #[must_use]
    pub fn token_bytes(&self) -> u64 {
        u64::from(self.planes) * u64::from(self.plane_bytes_per_token)
    }
}

/// What kind of state a part is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Form {
    /// KV pages of tokens 0..length.
    Paged(Planes),
    /// The same, but only the last `window_tokens` need exist.
    Window {
        /// Geometry of its blocks.
        planes: Planes,
        /// How many of the last tokens must exist.
        window_tokens: u32,
    },
    /// A fixed number of bytes, replaced whole.
    Snapshot {
        /// Exactly this many.
        bytes: u64,
    },
    /// An untyped string, addressed by byte offset.
    Bytes {
        /// Bytes in a full block.
        block_bytes: u64,
    },
}

impl Form {
    /// The geometry, of a paged or window part.
    #[must_use]
    pub const fn planes(&self) -> Option<&Planes> {
        match self {
            Self::Paged(planes) | Self::Window { planes, .. } => Some(planes),
            Self::Snapshot { .. } | Self::Bytes { .. } => None,
        }
    }

    /// Bytes in a full block.
    #[must_use]
    pub fn block_bytes(&self) -> u64 {
        match self {
            Self::Paged(planes) | Self::Window { planes, .. } => {
                planes.token_bytes() * u64::from(planes.tokens_per_block)
            }
            Self::Snapshot { bytes } => (*bytes).min(SNAPSHOT_BLOCK_BYTES),
            Self::Bytes { block_bytes } => *block_bytes,
        }
    }

    /// The word that the API uses.
    #[must_use]
    pub const fn word(&self) -> &'static str {
        match self {
            Self::Paged(_) => "paged",
            Self::Window { .. } => "window",
            Self::Snapshot { .. } => "snapshot",
            Self::Bytes { .. } => "bytes",
        }
    }

    /// Bytes that `tokens` take, of a part that counts tokens.
    #[must_use]
    pub fn bytes_of(&self, tokens: Tokens) -> Option<Bytes> {
        let planes = self.planes()?;
        tokens.0.checked_mul(planes.token_bytes()).map(Bytes)
    }
}

/// One kind of state in a session.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Part {
    /// Unique within the layout.
    pub name: PartName,
    /// What its bytes are.
    pub form: Form,
    /// What cold tiers keep instead of its bytes; where absent, these. Of paged parts in plane order only.
    pub cold: Option<Fp8>,
}

/// What a session's bytes are: model, fingerprint and parts. Immutable; made by [`Layout::new`] only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    model: Arc<str>,
    fingerprint: Arc<str>,
    parts: Arc<[Part]>,
    hash: LayoutHash,
}

/// A layout that cannot be, with the field that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct LayoutError {
    /// The field, as the API names it, e.g. `layout.parts[0].planes`.
    pub field: String,
    /// What is wrong and what is allowed.
    pub reason: String,
}

impl LayoutError {
    fn new(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { field: format!("layout.{}", field.into()), reason: reason.into() }
    }
}

fn within(field: String, value: u64, max: u64) -> Result<(), LayoutError> {
    if value == 0 || value > max {
        return Err(LayoutError::new(field, format!("{value} is out of range: 1 to {max}")));
    }
    Ok(())
}

fn check_planes(at: &str, planes: &Planes) -> Result<(), LayoutError> {
    within(format!("{at}.tokens_per_block"), planes.tokens_per_block.into(), TOKENS_PER_BLOCK_MAX.into())?;
    within(format!("{at}.planes"), planes.planes.into(), PLANES_MAX.into())?;
    within(format!("{at}.plane_bytes_per_token"), planes.plane_bytes_per_token.into(), 1 << 20)?;
    let block = planes.token_bytes() * u64::from(planes.tokens_per_block);
    if block > BLOCK_BYTES_MAX {
        let reason = format!(
            "a block would take {} and may take {}: use fewer tokens_per_block",
            Bytes(block),
            Bytes(BLOCK_BYTES_MAX)
        );
        return Err(LayoutError::new(format!("{at}.tokens_per_block"), reason));
    }
    Ok(())
}

impl Layout {
    /// Checks and hashes a layout.
    ///
    /// # Errors
    /// [`LayoutError`] naming the field: no or too many parts, names that are not unique, sizes of zero or
    /// beyond the limits.
    pub fn new(model: &str, fingerprint: &str, parts: Vec<Part>) -> Result<Self, LayoutError> {
        for (field, text) in [("model", model), ("fingerprint", fingerprint)] {
            if text.is_empty() || text.len() > TEXT_BYTES_MAX {
                return Err(LayoutError::new(
                    field,
                    format!("must have 1 to {TEXT_BYTES_MAX} bytes, has {}", text.len()),
                ));
            }
        }
        if parts.is_empty() || parts.len() > PARTS_MAX {
            return Err(LayoutError::new(
                "parts",
                format!("must have 1 to {PARTS_MAX} parts, has {}", parts.len()),
            ));
        }
        for (index, part) in parts.iter().enumerate() {
            let at = format!("parts[{index}]");
            if parts[..index].iter().any(|other| other.name == part.name) {
                return Err(LayoutError::new(
                    format!("{at}.name"),
                    format!("'{}' is named twice", part.name),
                ));
            }
            match &part.form {
                Form::Paged(planes) => check_planes(&at, planes)?,
                Form::Window { planes, window_tokens } => {
                    check_planes(&at, planes)?;
                    within(format!("{at}.window_tokens"), (*window_tokens).into(), 1 << 24)?;
                }
                Form::Snapshot { bytes } => within(format!("{at}.bytes"), *bytes, SNAPSHOT_BYTES_MAX)?,
                Form::Bytes { block_bytes } => {
                    within(format!("{at}.block_bytes"), *block_bytes, BLOCK_BYTES_MAX)?
                }
            }
            part.check_cold().map_err(|(field, why)| LayoutError::new(format!("{at}.cold{field}"), why))?;
        }
        let hash = LayoutHash::of(&canonical(model, fingerprint, &parts));
        Ok(Self { model: model.into(), fingerprint: fingerprint.into(), parts: parts.into(), hash })
    }

    /// The model's name.
    #[must_use]
    pub fn model(&self) -> &str {
        &self.model
    }

    /// Whatever changes the bytes' meaning: weights, adapter, rope, KV dtype and scales, the engine's order.
    #[must_use]
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The parts, in order.
    #[must_use]
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// The place of the part `name`.
    #[must_use]
    pub fn part_index(&self, name: &str) -> Option<usize> {
        self.parts.iter().position(|part| part.name.as_str() == name)
    }

    /// Whether what comes back from a cold tier is not always what went there.
    #[must_use]
    pub fn is_lossy(&self) -> bool {
        self.parts.iter().any(|part| part.cold.is_some())
    }

    /// The same layout with this cold form of each paged part in plane order, and of no other.
    ///
    /// # Errors
    /// [`LayoutError`] where a part cannot have it, or none is in plane order.
    pub fn with_cold(&self, cold: Option<Fp8>) -> Result<Self, LayoutError> {
        let takes = |part: &Part| matches!(part.form, Form::Paged(Planes { order: Order::Plane, .. }));
        if cold.is_some() && !self.parts.iter().any(takes) {
            return Err(LayoutError::new(
                "parts",
                "none is paged in plane order, so none can be kept as fp8",
            ));
        }
        let part = |part: &Part| Part { cold: cold.filter(|_| takes(part)), ..part.clone() };
        Self::new(&self.model, &self.fingerprint, self.parts.iter().map(part).collect())
    }

    /// BLAKE3 of the canonical encoding.
    #[must_use]
    pub const fn hash(&self) -> LayoutHash {
        self.hash
    }
}

/// The canonical encoding: each text length-prefixed, each number as 8 bytes, little endian.
fn canonical(model: &str, fingerprint: &str, parts: &[Part]) -> Vec<u8> {
    let mut out = Vec::with_capacity(64 + 64 * parts.len());
    let text = |out: &mut Vec<u8>, text: &str| {
        out.extend((text.len() as u64).to_le_bytes());
        out.extend(text.as_bytes());
    };
    let geometry = |out: &mut Vec<u8>, planes: &Planes| {
        for number in [planes.tokens_per_block, planes.planes, planes.plane_bytes_per_token] {
            out.extend(u64::from(number).to_le_bytes());
        }
        out.push(match planes.order {
            Order::Token => 0,
            Order::Plane => 1,
        });
    };
    text(&mut out, "keepwarm layout 1");
    text(&mut out, model);
    text(&mut out, fingerprint);
    for part in parts {
        text(&mut out, part.name.as_str());
        text(&mut out, part.form.word());
        match &part.form {
            Form::Paged(planes) => geometry(&mut out, planes),
            Form::Window { planes, window_tokens } => {
                geometry(&mut out, planes);
                out.extend(u64::from(*window_tokens).to_le_bytes());
            }
            Form::Snapshot { bytes } => out.extend(bytes.to_le_bytes()),
            Form::Bytes { block_bytes } => out.extend(block_bytes.to_le_bytes()),
        }
        if let Some(Fp8 { from }) = part.cold {
            // No part has a name with a space, so this is not taken for the next one's.
            text(&mut out, "cold fp8");
            out.push(match from {
                Number::F32 => 0,
                Number::F16 => 1,
                Number::Bf16 => 2,
            });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kv(tokens_per_block: u32) -> Part {
        let planes = Planes { tokens_per_block, planes: 60, plane_bytes_per_token: 384, order: Order::Plane };
        Part { name: "kv".parse().unwrap(), form: Form::Paged(planes), cold: None }
    }

    #[test]
    fn sizes_follow_the_geometry() {
        let form = kv(16).form;
        assert_eq!(form.block_bytes(), 368_640);
        assert_eq!(form.bytes_of(Tokens(64)), Some(Bytes(1_474_560)));
    }

    #[test]
    fn layouts_differ_by_hash_when_any_field_differs() {
        let base = Layout::new("m", "f", vec![kv(16)]).unwrap();
        assert_eq!(base.hash(), Layout::new("m", "f", vec![kv(16)]).unwrap().hash());
        for other in [
            Layout::new("m2", "f", vec![kv(16)]),
            Layout::new("m", "f2", vec![kv(16)]),
            Layout::new("m", "f", vec![kv(32)]),
        ] {
            assert_ne!(base.hash(), other.unwrap().hash());
        }
    }

    #[test]
    fn absurd_layouts_name_the_field() {
        let field = |result: Result<Layout, LayoutError>| result.unwrap_err().field;
        assert_eq!(field(Layout::new("", "f", vec![kv(16)])), "layout.model");
        assert_eq!(field(Layout::new("m", "f", vec![])), "layout.parts");
        assert_eq!(field(Layout::new("m", "f", vec![kv(0)])), "layout.parts[0].tokens_per_block");
        assert_eq!(field(Layout::new("m", "f", vec![kv(16), kv(16)])), "layout.parts[1].name");
        let huge = Part { name: "s".parse().unwrap(), form: Form::Snapshot { bytes: u64::MAX }, cold: None };
        assert_eq!(field(Layout::new("m", "f", vec![huge])), "layout.parts[0].bytes");
    }
}
