//! First-fit address allocation in one area. Knows numbers only: neither mappings nor what lies in them.

use std::collections::BTreeMap;

use super::{ALIGNMENT, RED_ZONE};

/// Addresses `base..base + bytes`, and which of them are taken.
#[derive(Debug)]
pub(crate) struct Area {
    base: usize,
    bytes: usize,
    taken: BTreeMap<usize, usize>,
}

impl Area {
    pub(crate) fn new(base: usize, bytes: usize) -> Self {
        Self { base, bytes, taken: BTreeMap::new() }
    }

    /// The lowest gap that holds `bytes` and a red zone.
    pub(crate) fn take(&mut self, bytes: usize, alignment: usize) -> Option<usize> {
        let needed = bytes.checked_next_multiple_of(ALIGNMENT)?.checked_add(RED_ZONE)?;
        let mut at = self.base.checked_next_multiple_of(alignment)?;
        for (&start, &length) in &self.taken {
            if at.checked_add(needed)? <= start {
                break;
            }
            at = (start + length).checked_next_multiple_of(alignment)?;
        }
        if at.checked_add(needed)? > self.base + self.bytes {
            return None;
        }
        self.taken.insert(at, needed);
        Some(at)
    }

    /// Gives back what `take` gave.
    pub(crate) fn give(&mut self, start: usize) {
        self.taken.remove(&start);
    }

    #[cfg(test)]
    fn contains(&self, address: usize) -> bool {
        (self.base..self.base + self.bytes).contains(&address)
    }

    pub(crate) fn base(&self) -> usize {
        self.base
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_found_and_neighbours_never_touch() {
        let mut area = Area::new(1 << 20, 1 << 20);
        let first = area.take(1, ALIGNMENT).unwrap();
        let second = area.take(1000, ALIGNMENT).unwrap();
        let third = area.take(1, ALIGNMENT).unwrap();
        assert!(second >= first + 1 + RED_ZONE && third >= second + 1000 + RED_ZONE);
        area.give(second);
        assert_eq!(area.take(900, ALIGNMENT), Some(second));
        assert!(area.take(1 << 20, ALIGNMENT).is_none());
        assert!(area.take(usize::MAX, ALIGNMENT).is_none());
        assert_eq!(area.take(1, 1 << 16).map(|at| at % (1 << 16)), Some(0));
        assert!(area.contains(first) && !area.contains(0));
    }
}
