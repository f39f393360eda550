use std::collections::HashMap;

use keepwarm_types::{Birth, Bytes, Owner};
use proptest::prelude::{Strategy, any, prop, prop_oneof, proptest};

use super::{Arena, ArenaSettings, OutOfMemory};
use crate::guard::{Block, BlockMut, GuardError};

fn owner(tenant: &str, birth: u64) -> Owner {
    Owner { tenant: tenant.parse().unwrap(), birth: Birth::from_random(birth) }
}

fn arena(bytes: u64, extent: u64) -> Arena {
    let settings =
        ArenaSettings { name: "test".to_owned(), bytes: Bytes(bytes), extent: Bytes(extent), lock: false };
    Arena::reserve(&settings).unwrap()
}

fn one(arena: &Arena, owner: &Owner, bytes: u64) -> BlockMut {
    arena.allocate(owner, Bytes(bytes), 1).unwrap().pop().unwrap()
}

#[test]
fn an_emptied_extent_serves_another_size() {
    let arena = arena(2 << 16, 1 << 16);
    let acme = owner("acme", 1);
    let small = arena.allocate(&acme, Bytes(4096), 32).unwrap();
    assert!(matches!(arena.allocate(&acme, Bytes(8192), 1), Err(OutOfMemory::Full { .. })));
    drop(small);
    assert_eq!(arena.figures().largest_free, Bytes(1 << 16));
    let large = arena.allocate(&acme, Bytes(1 << 16), 2).unwrap();
    assert_eq!(arena.figures().used, Bytes(2 << 16));
    drop(large);
    arena.validate();
    assert_eq!(arena.figures().used, Bytes(0));
}

#[test]
fn a_refused_allocation_takes_nothing() {
    let arena = arena(1 << 16, 1 << 16);
    let acme = owner("acme", 1);
    assert!(arena.allocate(&acme, Bytes(1 << 14), 5).is_err());
    assert_eq!(arena.figures().used, Bytes(0));
    assert!(matches!(arena.allocate(&acme, Bytes(1 << 17), 1), Err(OutOfMemory::TooLarge { .. })));
}

//= GUARANTEES.md#G4
#[test]
fn only_the_owner_reads_and_only_what_was_written() {
    let arena = arena(1 << 16, 1 << 16);
    let acme = owner("acme", 1);
    let mut block = one(&arena, &acme, 100);
    assert!(block.write(1, b"gap").is_err(), "a gap would expose what was there before");
    block.write(0, b"hello").unwrap();
    let (block, error) = block.seal(6).unwrap_err();
    assert!(matches!(error, GuardError::Bounds { .. }));
    let block = block.seal(5).unwrap();
    assert_eq!(block.bytes(&acme).unwrap(), b"hello");
    assert_eq!(block.bytes(&owner("acme", 2)), Err(GuardError::WrongOwner));
    assert_eq!(block.bytes(&owner("umbrella", 1)), Err(GuardError::WrongOwner));
    let fork = block.share(Birth::from_random(2));
    drop(block);
    assert_eq!(fork.bytes(&owner("acme", 2)).unwrap(), b"hello");
    assert!(fork.view(&owner("acme", 2), 2..9).is_err());
    assert_eq!(fork.view(&owner("acme", 2), 1..4).unwrap().as_ref(), b"ell");
}

#[test]
fn a_flipped_bit_is_found() {
    let arena = arena(1 << 16, 1 << 16);
    let mut block = one(&arena, &owner("acme", 1), 5000);
    block.bytes_mut().fill(7);
    let block = block.seal(5000).unwrap();
    block.verify().unwrap();
    crate::fault::flip_bit(&block, 4999 * 8);
    assert!(block.verify().is_err());
}

#[derive(Debug, Clone)]
enum Op {
    Allocate { tenant: bool, size: u64 },
    Drop(usize),
    Seal(usize),
    Clone(usize),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (any::<bool>(), 1u64..20_000).prop_map(|(tenant, size)| Op::Allocate { tenant, size }),
        2 => any::<usize>().prop_map(Op::Drop),
        1 => any::<usize>().prop_map(Op::Seal),
        1 => any::<usize>().prop_map(Op::Clone),
    ]
}

enum Held {
    Mut(BlockMut),
    Sealed(Block),
}

//= GUARANTEES.md#G4
#[test]
fn what_a_shorter_block_left_of_another_tenant_is_zeroed_before_a_longer_one_shows_it() {
    let arena = arena(1 << 16, 1 << 15);
    let (acme, umbrella) = (owner("acme", 1), owner("umbrella", 2));
    let keep = arena.allocate(&acme, Bytes(128), 1).unwrap();
    let take = |who: &Owner, size| arena.allocate(who, Bytes(size), 1).unwrap().pop().unwrap();
    take(&acme, 128).bytes_mut().fill(0xaa);
    // The same slot: once written in part, once shorter than the slot, then whole.
    take(&umbrella, 128).write(0, &[0xbb; 64]).unwrap();
    take(&umbrella, 65).bytes_mut().fill(0xbb);
    assert!(!take(&umbrella, 128).bytes_mut().contains(&0xaa), "another tenant's bytes show");
    drop(keep);
}

proptest! {
    /// Two tenants allocate, write, seal, clone and drop; every block keeps its own canary, and a fresh
    /// block never shows the other tenant's.
    #[test]
    fn tenants_never_see_each_others_bytes(ops in prop::collection::vec(op(), 1..200)) {
        let arena = arena(1 << 18, 1 << 15);
        let tenants = [owner("acme", 1), owner("umbrella", 2)];
        let mut held: HashMap<usize, (usize, u8, Held)> = HashMap::new();
        let mut next = 0;
        for op in ops {
            let pick = |n: usize| held.keys().copied().nth(n % held.len().max(1));
            match op {
                Op::Allocate { tenant, size } => {
                    let who = usize::from(tenant);
                    let Ok(mut blocks) = arena.allocate(&tenants[who], Bytes(size), 1) else { continue };
                    let mut block = blocks.pop().unwrap();
                    let foreign = if who == 0 { 0xbb } else { 0xaa };
                    let canary = if who == 0 { 0xaa } else { 0xbb };
                    assert!(block.bytes().is_empty());
                    assert!(!block.bytes_mut().contains(&foreign), "another tenant's bytes show");
                    block.bytes_mut().fill(canary);
                    held.insert(next, (who, canary, Held::Mut(block)));
                    next += 1;
                }
                Op::Drop(n) => { if let Some(id) = pick(n) { held.remove(&id); } }
                Op::Seal(n) => {
                    let Some(id) = pick(n) else { continue };
                    let (who, canary, block) = held.remove(&id).unwrap();
                    let block = match block {
                        Held::Mut(block) => { let length = block.written(); block.seal(length).unwrap() }
                        Held::Sealed(block) => block,
                    };
                    held.insert(id, (who, canary, Held::Sealed(block)));
                }
                Op::Clone(n) => {
                    let Some(id) = pick(n) else { continue };
                    if let (who, canary, Held::Sealed(block)) = &held[&id] {
                        let copy = (*who, *canary, Held::Sealed(block.clone()));
                        held.insert(next, copy);
                        next += 1;
                    }
                }
            }
            arena.validate();
            for (who, canary, block) in held.values() {
                let bytes = match block { Held::Mut(block) => block.bytes(), Held::Sealed(block) => block.bytes(&tenants[*who]).unwrap() };
                assert!(bytes.iter().all(|byte| byte == canary), "a live block was overwritten");
            }
        }
        held.clear();
        assert_eq!(arena.figures().used, Bytes(0));
        assert_eq!(arena.figures().blocks, 0);
    }
}
