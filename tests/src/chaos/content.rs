//! Bytes that name their origin: a part is made of cells, and each says of which session, by which write, and the
//! how-manieth of that write it is.

use uuid::Uuid;

/// Bytes of a cell: session 16, write 8, place 8, and a filling that follows from those.
pub const CELL: usize = 64;

/// Cells of one write, one after another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Run {
    /// Number of the write within its session.
    pub write: u64,
    pub cells: u64,
}

/// SplitMix64: spreads a number over all bits.
const fn spread(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn cell(session: Uuid, write: u64, place: u64) -> [u8; CELL] {
    let mut bytes = [0; CELL];
    bytes[..16].copy_from_slice(session.as_bytes());
    bytes[16..24].copy_from_slice(&write.to_le_bytes());
    bytes[24..32].copy_from_slice(&place.to_le_bytes());
    let mut filling = spread(session.as_u64_pair().1 ^ spread(write) ^ place);
    for word in bytes[32..].chunks_exact_mut(8) {
        filling = spread(filling);
        word.copy_from_slice(&filling.to_le_bytes());
    }
    bytes
}

/// What one write writes.
#[must_use]
pub fn written(session: Uuid, run: Run) -> Vec<u8> {
    (0..run.cells).flat_map(|place| cell(session, run.write, place)).collect()
}

/// Which writes a part's bytes come from.
///
/// # Errors
/// What no write of this session can have written, and where it stands.
pub fn read(session: Uuid, bytes: &[u8]) -> Result<Vec<Run>, String> {
    let mut runs: Vec<Run> = Vec::new();
    if !bytes.len().is_multiple_of(CELL) {
        return Err(format!("{} bytes are not whole cells of {CELL}", bytes.len()));
    }
    for (at, found) in bytes.chunks_exact(CELL).enumerate() {
        let number = |from: usize| {
            let word: [u8; 8] = found[from..from + 8].try_into().expect("eight bytes are eight bytes");
            u64::from_le_bytes(word)
        };
        let owner = Uuid::from_slice(&found[..16]).expect("sixteen bytes are an id");
        let (write, place) = (number(16), number(24));
        if owner != session {
            return Err(format!("cell {at} is of session {owner}"));
        }
        if found != cell(session, write, place) {
            return Err(format!("cell {at} says write {write}, place {place}, but is filled otherwise"));
        }
        match runs.last_mut() {
            Some(run) if run.write == write && run.cells == place => run.cells += 1,
            _ if place == 0 => runs.push(Run { write, cells: 1 }),
            _ => return Err(format!("cell {at} is of write {write}, place {place}, out of its order")),
        }
    }
    Ok(runs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_read_back_as_the_writes_that_made_them() {
        let id = Uuid::from_u128(7);
        let runs = [Run { write: 3, cells: 5 }, Run { write: 4, cells: 1 }, Run { write: 9, cells: 2 }];
        let bytes: Vec<u8> = runs.iter().flat_map(|run| written(id, *run)).collect();
        assert_eq!(read(id, &bytes).unwrap(), runs);
        assert_eq!(read(id, &[]).unwrap(), []);
    }

    #[test]
    fn what_nobody_wrote_is_told_with_its_place() {
        let (id, other) = (Uuid::from_u128(7), Uuid::from_u128(8));
        let bytes = written(id, Run { write: 1, cells: 3 });
        let mut flipped = bytes.clone();
        flipped[CELL + 40] ^= 1;
        assert!(read(id, &flipped).unwrap_err().contains("cell 1"));
        assert!(read(other, &bytes).unwrap_err().contains("of session"));
        assert!(read(id, &bytes[..CELL + 1]).unwrap_err().contains("whole cells"));
        assert!(read(id, &bytes[CELL..]).unwrap_err().contains("out of its order"));
        let twice: Vec<u8> = [&bytes[..CELL], &bytes[..CELL]].concat();
        assert_eq!(read(id, &twice).unwrap().len(), 2, "a write twice is for the checker to tell");
    }
}
