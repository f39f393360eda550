//! Layouts on the wire, and the cache that keeps one of each in memory.
//!
//! A manifest brings its layout whole: it is a few hundred bytes, and a receiver never has to ask for it. The
//! receiver keeps the layouts that it has met, so that a million sessions of one layout share it, and compares
//! what comes with what it has: a hash alone is never believed.

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, PoisonError};

use keepwarm_core::session::{Form, Fp8, Layout, Number, Order, PARTS_MAX, Part, Planes};
use keepwarm_types::LayoutHash;
use lru::LruCache;
use rkyv::{Archive, Serialize};

use crate::error::{DecodeError, field, name};
use crate::limits::{LAYOUT_TEXT_MAX, TooLong, within};

/// Layouts that a cache keeps: one per model, engine and degree of parallelism in use. At most 128 parts of some
/// 100 bytes each, 13 MiB; in practice a few KiB.
pub const LAYOUTS_MAX: NonZeroUsize = NonZeroUsize::MIN.saturating_add(1023);

/// The layouts that were met, the least recently used of which goes when there are [`LAYOUTS_MAX`].
///
/// A layout that went lives on in the manifests that have it; the next manifest brings another copy.
#[derive(Debug)]
pub struct LayoutCache {
    layouts: Mutex<LruCache<LayoutHash, Arc<Layout>>>,
}

impl Default for LayoutCache {
    fn default() -> Self {
        Self::new()
    }
}

impl LayoutCache {
    /// An empty cache.
    #[must_use]
    pub fn new() -> Self {
        Self { layouts: Mutex::new(LruCache::new(LAYOUTS_MAX)) }
    }

    /// The one in memory that equals this one: the first that came.
    #[must_use]
    pub fn intern(&self, layout: Arc<Layout>) -> Arc<Layout> {
        let mut layouts = self.layouts.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(layouts.get_or_insert(layout.hash(), || layout))
    }

    fn get(&self, hash: &LayoutHash) -> Option<Arc<Layout>> {
        self.layouts.lock().unwrap_or_else(PoisonError::into_inner).get(hash).cloned()
    }
}

#[derive(Archive, Serialize)]
pub(crate) struct WireLayout {
    hash: [u8; 32],
    model: String,
    fingerprint: String,
    parts: Vec<WirePart>,
}

#[derive(Archive, Serialize)]
struct WirePart {
    name: String,
    form: WireForm,
}

#[derive(Archive, Serialize)]
enum WireForm {
    Paged(WirePlanes),
    Window {
        planes: WirePlanes,
        window_tokens: u32,
    },
    Snapshot {
        bytes: u64,
    },
    Bytes {
        block_bytes: u64,
    },
    /// Paged, and cold tiers keep FP8 of these numbers. Since version 2, whose other forms have the bytes of version 1
    /// all the same: it is the last, and no larger than the largest.
    Fp8 {
        planes: WirePlanes,
        from: WireNumber,
    },
}

#[derive(Archive, Serialize)]
enum WireNumber {
    F32,
    F16,
    Bf16,
}

#[derive(Archive, Serialize)]
struct WirePlanes {
    tokens_per_block: u32,
    planes: u32,
    plane_bytes_per_token: u32,
    plane_order: bool,
}

impl WireLayout {
    pub(crate) fn new(layout: &Layout) -> Result<Self, TooLong> {
        within("layout.parts", layout.parts().len(), PARTS_MAX)?;
        let part = |part: &Part| WirePart { name: part.name.to_string(), form: part.into() };
        Ok(Self {
            hash: layout.hash().0,
            model: layout.model().to_owned(),
            fingerprint: layout.fingerprint().to_owned(),
            parts: layout.parts().iter().map(part).collect(),
        })
    }
}

impl From<&Part> for WireForm {
    fn from(part: &Part) -> Self {
        match &part.form {
            Form::Paged(planes) if let Some(Fp8 { from }) = part.cold => {
                Self::Fp8 { planes: planes.into(), from: from.into() }
            }
            Form::Paged(planes) => Self::Paged(planes.into()),
            Form::Window { planes, window_tokens } => {
                Self::Window { planes: planes.into(), window_tokens: *window_tokens }
            }
            Form::Snapshot { bytes } => Self::Snapshot { bytes: *bytes },
            Form::Bytes { block_bytes } => Self::Bytes { block_bytes: *block_bytes },
        }
    }
}

impl From<Number> for WireNumber {
    fn from(number: Number) -> Self {
        match number {
            Number::F32 => Self::F32,
            Number::F16 => Self::F16,
            Number::Bf16 => Self::Bf16,
        }
    }
}

impl From<&Planes> for WirePlanes {
    fn from(planes: &Planes) -> Self {
        Self {
            tokens_per_block: planes.tokens_per_block,
            planes: planes.planes,
            plane_bytes_per_token: planes.plane_bytes_per_token,
            plane_order: planes.order == Order::Plane,
        }
    }
}

impl ArchivedWireLayout {
    /// The layout in the cache where it is the same, else a new one by the layout's own rules.
    pub(crate) fn read(&self, cache: &LayoutCache) -> Result<Arc<Layout>, DecodeError> {
        within("layout.parts", self.parts.len(), PARTS_MAX)?;
        within("layout.model", self.model.len(), LAYOUT_TEXT_MAX)?;
        within("layout.fingerprint", self.fingerprint.len(), LAYOUT_TEXT_MAX)?;
        let hash = LayoutHash(self.hash);
        if let Some(layout) = cache.get(&hash).filter(|layout| self.is(layout)) {
            return Ok(layout);
        }
        let part = |part: &ArchivedWirePart| -> Result<Part, DecodeError> {
            let (form, cold) = part.form.read();
            Ok(Part { name: name("layout.parts.name", &part.name)?, form, cold })
        };
        let parts = self.parts.iter().map(part).collect::<Result<_, _>>()?;
        let layout =
            Layout::new(&self.model, &self.fingerprint, parts).map_err(|error| field("layout", error))?;
        if layout.hash() != hash {
            return Err(field("layout.hash", format!("says {hash}, and the layout has {}", layout.hash())));
        }
        Ok(cache.intern(Arc::new(layout)))
    }

    fn is(&self, layout: &Layout) -> bool {
        let same = |(wire, part): (&ArchivedWirePart, &Part)| {
            part.name.as_str() == &*wire.name && (part.form, part.cold) == wire.form.read()
        };
        layout.model() == &*self.model
            && layout.fingerprint() == &*self.fingerprint
            && layout.parts().len() == self.parts.len()
            && self.parts.iter().zip(layout.parts()).all(same)
    }
}

impl ArchivedWireForm {
    fn read(&self) -> (Form, Option<Fp8>) {
        let form = match self {
            Self::Paged(planes) => Form::Paged(planes.read()),
            Self::Window { planes, window_tokens } => {
                Form::Window { planes: planes.read(), window_tokens: window_tokens.to_native() }
            }
            Self::Snapshot { bytes } => Form::Snapshot { bytes: bytes.to_native() },
            Self::Bytes { block_bytes } => Form::Bytes { block_bytes: block_bytes.to_native() },
            Self::Fp8 { planes, from } => {
                return (Form::Paged(planes.read()), Some(Fp8 { from: from.read() }));
            }
        };
        (form, None)
    }
}

impl ArchivedWireNumber {
    fn read(&self) -> Number {
        match self {
            Self::F32 => Number::F32,
            Self::F16 => Number::F16,
            Self::Bf16 => Number::Bf16,
        }
    }
}

impl ArchivedWirePlanes {
    fn read(&self) -> Planes {
        Planes {
            tokens_per_block: self.tokens_per_block.to_native(),
            planes: self.planes.to_native(),
            plane_bytes_per_token: self.plane_bytes_per_token.to_native(),
            order: if self.plane_order { Order::Plane } else { Order::Token },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::archive::{Opened, seal};
    use crate::version::Version;

    fn wire(model: &str) -> WireLayout {
        let part =
            Part { name: "kv".parse().unwrap(), form: Form::Bytes { block_bytes: 1 << 20 }, cold: None };
        WireLayout::new(&Layout::new(model, "f", vec![part]).unwrap()).unwrap()
    }

    fn read(wire: &WireLayout, cache: &LayoutCache) -> Result<Arc<Layout>, DecodeError> {
        let frame = seal(Version::NEWEST, 1, "layout", wire, 0, 1 << 20).unwrap();
        Opened::new(&frame, 1, "layout", 1 << 20)?.root::<ArchivedWireLayout>()?.read(cache)
    }

    #[test]
    fn a_hash_is_not_believed_even_where_it_is_known() {
        let cache = LayoutCache::new();
        let known = read(&wire("a"), &cache).unwrap();
        let forged = WireLayout { hash: known.hash().0, ..wire("b") };
        let text = read(&forged, &cache).unwrap_err().to_string();
        assert!(text.starts_with("layout.hash: says "), "{text}");
        assert!(Arc::ptr_eq(&read(&wire("a"), &cache).unwrap(), &known));
    }

    #[test]
    fn what_the_layout_refuses_is_refused_with_its_field() {
        let none = WireLayout { parts: Vec::new(), ..wire("a") };
        let text = read(&none, &LayoutCache::new()).unwrap_err().to_string();
        assert_eq!(text, "layout: layout.parts: must have 1 to 128 parts, has 0");
        let part = || WirePart { name: "kv".to_owned(), form: WireForm::Snapshot { bytes: 1 } };
        let many = WireLayout { parts: (0..=PARTS_MAX).map(|_| part()).collect(), ..wire("a") };
        let text = read(&many, &LayoutCache::new()).unwrap_err().to_string();
        assert_eq!(text, "layout.parts: 129 are more than the 128 that a frame may hold");
        let long = WireLayout { fingerprint: "f".repeat(LAYOUT_TEXT_MAX + 1), ..wire("a") };
        let text = read(&long, &LayoutCache::new()).unwrap_err().to_string();
        assert_eq!(text, "layout.fingerprint: 257 are more than the 256 that a frame may hold");
    }

    #[test]
    fn the_cache_is_bounded() {
        let cache = LayoutCache::new();
        for model in 0..LAYOUTS_MAX.get() + 10 {
            read(&wire(&model.to_string()), &cache).unwrap();
        }
        assert_eq!(cache.layouts.lock().unwrap().len(), LAYOUTS_MAX.get());
    }
}
