//! `Repr-Digest` (RFC 9530) with XXH3-128: written for what is sent, checked for what is read.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use twox_hash::XxHash3_128;

/// The header's name.
pub(crate) const REPR_DIGEST: &str = "repr-digest";
const ALGORITHM: &str = "xxh3-128=:";

/// The header's value for a body with this digest (big-endian bytes, as XXH3's canonical form has them).
pub(crate) fn header_value(digest: u128) -> String {
    format!("{ALGORITHM}{}:", STANDARD.encode(digest.to_be_bytes()))
}

/// The digest of whole bytes.
pub(crate) fn of(bytes: &[u8]) -> u128 {
    XxHash3_128::oneshot(bytes)
}

/// The XXH3-128 member of a header; other algorithms are passed over.
pub(crate) fn announced(header: &str) -> Option<u128> {
    let member = header.split(',').map(str::trim).find_map(|member| member.strip_prefix(ALGORITHM))?;
    let bytes = STANDARD.decode(member.strip_suffix(':')?).ok()?;
    Some(u128::from_be_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_go_through_the_header() {
        let digest = of(b"state");
        let header = format!("sha-256=:AAAA:, {}", header_value(digest));
        assert_eq!(announced(&header), Some(digest));
        assert_eq!(announced("sha-256=:AAAA:"), None);
        assert_eq!(announced("xxh3-128=:AAAA:"), None);
        assert_eq!(of(b""), 0x99aa_06d3_0147_98d8_6001_c324_468d_497f, "XXH3-128 of nothing");
    }
}
