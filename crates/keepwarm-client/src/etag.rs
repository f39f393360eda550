//! A session's life and revision, as HTTP carries them.

use std::fmt;
use std::str::FromStr;

use keepwarm_types::{Birth, Revision};

/// `"BIRTH-REVISION"`: which life of a session, and which committed write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Etag {
    /// The life.
    pub birth: Birth,
    /// The write.
    pub revision: Revision,
}

impl fmt::Display for Etag {
    /// With the quotes that HTTP wants.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}-{}\"", self.birth, self.revision)
    }
}

/// The text is not an entity tag of a session.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not an entity tag of the form \"BIRTH-REVISION\"")]
pub struct ParseEtagError(String);

impl FromStr for Etag {
    type Err = ParseEtagError;

    /// With or without the quotes.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseEtagError(text.to_owned());
        let (birth, revision) = text.trim_matches('"').split_once('-').ok_or_else(error)?;
        let birth = birth.parse().map_err(|_| error())?;
        let revision = revision.parse().map(Revision).map_err(|_| error())?;
        Ok(Self { birth, revision })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_print_and_parse_alike() {
        let etag = Etag { birth: Birth::from_random(77), revision: Revision(12) };
        assert_eq!(etag.to_string().parse(), Ok(etag));
        assert_eq!(etag.to_string().trim_matches('"').parse(), Ok(etag));
        for bad in ["", "7", "\"short-1\"", "\"0000000000-x\""] {
            assert!(bad.parse::<Etag>().is_err(), "{bad}");
        }
    }
}
