//! Stop texts: what ends an answer, and is not part of it.

/// Watches an answer for its stop texts, holding back what may be the beginning of one.
#[derive(Debug, Clone, Default)]
pub struct StopMatcher {
    stops: Vec<String>,
    held: String,
}

impl StopMatcher {
    /// Watches for `stops`.
    #[must_use]
    pub fn new(stops: Vec<String>) -> Self {
        Self { stops, held: String::new() }
    }

    /// Takes more text; gives what is surely part of the answer, and whether it has ended.
    pub fn push(&mut self, text: &str) -> (String, bool) {
        self.held.push_str(text);
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let sure = self.held.len() - keep;
        let rest = self.held.split_off(sure);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// The answer has ended: what was held back is part of it.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Bytes at the end of `text` that a stop could begin with.
fn overlap(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len() - 1);
    let fits = |length: &usize| stop.is_char_boundary(*length) && text.ends_with(&stop[..*length]);
    (1..=longest).rev().find(fits).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{prop, proptest};

    use super::*;

    #[test]
    fn a_stop_across_pieces_ends_the_answer() {
        let mut matcher = StopMatcher::new(vec!["END".to_owned(), "\n\n".to_owned()]);
        assert_eq!(matcher.push("a E"), ("a ".to_owned(), false));
        assert_eq!(matcher.push("N"), (String::new(), false));
        assert_eq!(matcher.push("x\n"), ("ENx".to_owned(), false));
        assert_eq!(matcher.push("\nrest"), (String::new(), true));
    }

    proptest! {
        #[test]
        fn pieces_give_what_the_whole_gives(text in "[abc]{0,40}", stop in "[abc]{1,4}", cut in prop::collection::vec(1usize..6, 1..20)) {
            let expected = text.find(&stop).map_or(text.as_str(), |at| &text[..at]);
            let mut matcher = StopMatcher::new(vec![stop]);
            let (mut out, mut rest, mut ended) = (String::new(), text.as_str(), false);
            for length in cut.iter().cycle() {
                if rest.is_empty() || ended { break }
                let (piece, tail) = rest.split_at((*length).min(rest.len()));
                rest = tail;
                let (sure, end) = matcher.push(piece);
                out.push_str(&sure);
                ended = end;
            }
            if !ended { out.push_str(&matcher.finish()); }
            assert_eq!(out, expected);
        }
    }
}
