//! Layouts over HTTP.

use std::sync::Arc;

use keepwarm_core::session::{BLOCK_BYTES_DEFAULT, Form, Fp8, Layout, Number, Order, Part, PartName, Planes};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::problem::Problem;

/// What a session's bytes are.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct LayoutDto {
    /// The model's name.
    model: String,
    /// Whatever changes the bytes' meaning: weights, adapter, rope, dtype, the engine's order.
    fingerprint: String,
    /// 1 to 128 parts.
    parts: Vec<PartDto>,
}

/// How a paged part's bytes lie.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum OrderDto {
    /// Tokens one after another.
    Token,
    /// Blocks one after another, each plane by plane.
    Plane,
}

/// What cold tiers keep of a part's numbers.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ColdDto {
    dtype: ColdNumberDto,
    /// What the numbers are that clients and models have.
    from: NumberDto,
}

/// A narrow number.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ColdNumberDto {
    /// FP8 E4M3, with a scale for each plane of a block.
    Fp8,
}

/// A number, in little-endian bytes.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum NumberDto {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper half of a binary32.
    Bf16,
}

/// One kind of state.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(tag = "form", rename_all = "lowercase", deny_unknown_fields)]
pub(crate) enum PartDto {
    /// KV pages of tokens 0..length.
    Paged {
        /// Unique within the layout.
        name: String,
        /// Tokens in a full block.
        tokens_per_block: u32,
        /// Layers x K/V x head groups.
        planes: u32,
        /// Bytes of a token in a plane.
        plane_bytes_per_token: u32,
        /// How the bytes lie.
        order: OrderDto,
        /// What cold tiers keep instead of the bytes, if not these; needs order = plane. What is read then is near to what
        /// was written, and the session says `lossy`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        cold: Option<ColdDto>,
    },
    /// The same, but only the last tokens need exist.
    Window {
        /// Unique within the layout.
        name: String,
        /// Tokens in a full block.
        tokens_per_block: u32,
        /// Layers x K/V x head groups.
        planes: u32,
        /// Bytes of a token in a plane.
        plane_bytes_per_token: u32,
        /// How the bytes lie.
        order: OrderDto,
        /// How many of the last tokens must exist.
        window_tokens: u32,
    },
    /// A fixed number of bytes, replaced whole.
    Snapshot {
        /// Unique within the layout.
        name: String,
        /// Exactly this many.
        bytes: u64,
    },
    /// An untyped string by offset.
    Bytes {
        /// Unique within the layout.
        name: String,
        /// Bytes in a full block; 1 MiB where absent.
        block_bytes: Option<u64>,
    },
}

impl OrderDto {
    const fn order(self) -> Order {
        match self {
            Self::Token => Order::Token,
            Self::Plane => Order::Plane,
        }
    }
}

impl NumberDto {
    const fn number(self) -> Number {
        match self {
            Self::F32 => Number::F32,
            Self::F16 => Number::F16,
            Self::Bf16 => Number::Bf16,
        }
    }
}

impl From<Number> for NumberDto {
    fn from(number: Number) -> Self {
        match number {
            Number::F32 => Self::F32,
            Number::F16 => Self::F16,
            Number::Bf16 => Self::Bf16,
        }
    }
}

impl LayoutDto {
    pub(crate) fn layout(self) -> Result<Arc<Layout>, Problem> {
        let wrong = |error: keepwarm_core::session::LayoutError| Problem::field(error.field, error.reason);
        let parts: Vec<_> =
            self.parts.into_iter().map(PartDto::part).collect::<Result<_, _>>().map_err(wrong)?;
        Layout::new(&self.model, &self.fingerprint, parts).map(Arc::new).map_err(wrong)
    }

    pub(crate) fn of(layout: &Layout) -> Self {
        Self {
            model: layout.model().to_owned(),
            fingerprint: layout.fingerprint().to_owned(),
            parts: layout.parts().iter().map(PartDto::of).collect(),
        }
    }
}

impl PartDto {
    fn part(self) -> Result<Part, keepwarm_core::session::LayoutError> {
        let geometry = |tokens_per_block, planes, plane_bytes_per_token, order: OrderDto| Planes {
            tokens_per_block,
            planes,
            plane_bytes_per_token,
            order: order.order(),
        };
        let mut fp8 = None;
        let (name, form) = match self {
            Self::Paged { name, tokens_per_block, planes, plane_bytes_per_token, order, cold } => {
                fp8 = cold.map(|ColdDto { dtype: ColdNumberDto::Fp8, from }| Fp8 { from: from.number() });
                (name, Form::Paged(geometry(tokens_per_block, planes, plane_bytes_per_token, order)))
            }
            Self::Window { name, tokens_per_block, planes, plane_bytes_per_token, order, window_tokens } => {
                let planes = geometry(tokens_per_block, planes, plane_bytes_per_token, order);
                (name, Form::Window { planes, window_tokens })
            }
            Self::Snapshot { name, bytes } => (name, Form::Snapshot { bytes }),
            Self::Bytes { name, block_bytes } => {
                (name, Form::Bytes { block_bytes: block_bytes.unwrap_or(BLOCK_BYTES_DEFAULT) })
            }
        };
        let name: PartName = name.parse()?;
        Ok(Part { name, form, cold: fp8 })
    }

    fn of(part: &Part) -> Self {
        let name = part.name.to_string();
        let order =
            |planes: &Planes| if planes.order == Order::Plane { OrderDto::Plane } else { OrderDto::Token };
        match part.form {
            Form::Paged(planes) => Self::Paged {
                name,
                tokens_per_block: planes.tokens_per_block,
                planes: planes.planes,
                plane_bytes_per_token: planes.plane_bytes_per_token,
                order: order(&planes),
                cold: part.cold.map(|Fp8 { from }| ColdDto { dtype: ColdNumberDto::Fp8, from: from.into() }),
            },
            Form::Window { planes, window_tokens } => Self::Window {
                name,
                tokens_per_block: planes.tokens_per_block,
                planes: planes.planes,
                plane_bytes_per_token: planes.plane_bytes_per_token,
                order: order(&planes),
                window_tokens,
            },
            Form::Snapshot { bytes } => Self::Snapshot { name, bytes },
            Form::Bytes { block_bytes } => Self::Bytes { name, block_bytes: Some(block_bytes) },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_go_round() {
        let text = r#"{"model":"m","fingerprint":"f","parts":[
            {"name":"kv","form":"paged","tokens_per_block":16,"planes":60,"plane_bytes_per_token":384,"order":"plane"},
            {"name":"w","form":"window","tokens_per_block":8,"planes":2,"plane_bytes_per_token":4,"order":"token","window_tokens":99},
            {"name":"s","form":"snapshot","bytes":5},{"name":"b","form":"bytes"},
            {"name":"c","form":"paged","tokens_per_block":16,"planes":60,"plane_bytes_per_token":384,"order":"plane",
             "cold":{"dtype":"fp8","from":"bf16"}}]}"#;
        let layout = crate::extract::parse_json::<LayoutDto>(text.as_bytes()).unwrap().layout().unwrap();
        let back = LayoutDto::of(&layout).layout().unwrap();
        assert_eq!(layout, back);
        assert_eq!(layout.parts()[3].form.block_bytes(), 1 << 20);
        assert_eq!(
            (layout.parts()[0].cold, layout.parts()[4].cold),
            (None, Some(Fp8 { from: Number::Bf16 }))
        );
    }

    #[test]
    fn a_wrong_field_is_named() {
        let problem =
            crate::extract::parse_json::<LayoutDto>(br#"{"model":"m","fingerprint":"f","parts":[],"x":1}"#)
                .unwrap_err();
        assert_eq!((problem.code(), problem.document("")["field"].as_str()), ("invalid_field", Some("x")));
        let empty = LayoutDto { model: "m".to_owned(), fingerprint: "f".to_owned(), parts: Vec::new() };
        assert_eq!(empty.layout().unwrap_err().document("")["field"], "layout.parts");
    }
}
