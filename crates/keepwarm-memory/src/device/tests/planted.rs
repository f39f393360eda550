//! Tests of the tests: each takes something out of a device that must be there, and what the suite checks must see it.
//!
//! A wait that is taken out is in `driver.rs`.

use keepwarm_types::{Birth, Owner};

use super::streams::{KINDS, SHAPE, TOKENS, pattern, wait};
use super::{Bench, Kind, bench, on_each_device};
use crate::device::{DeviceError, DeviceState, Direction, GatherJob, Job, ScatterJob, TransferError};
use crate::fault::Planted;

/// What the suite holds a device to that had an error: it is fenced, takes no work of any kind or does not answer it as
/// good, and no event passes.
pub(super) fn serves_nothing_more(bench: &Bench) -> Result<(), String> {
    for kind in 0..KINDS {
        if bench.start(kind).is_ok_and(|ending| ending()) {
            return Err(format!("work of kind {kind} was answered as good"));
        }
    }
    for direction in [Direction::In, Direction::Out] {
        if wait(bench.device.record(direction)).is_ok() {
            return Err(format!("an event passed on the stream {direction:?}"));
        }
    }
    match bench.device.state() {
        DeviceState::Up => Err("it is up".to_owned()),
        DeviceState::Fenced(_) => Ok(()),
    }
}

//= GUARANTEES.md#G9
fn a_device_that_goes_on_after_an_error_is_seen(kind: Kind) {
    for planted in [false, true] {
        let bench = bench(kind);
        if planted {
            Planted::plant(&bench.faults.planted.fences_nothing);
        }
        bench.faults.sticky_after(0);
        assert!(!bench.start(1).unwrap()(), "the error itself is told either way");
        let seen = serves_nothing_more(&bench);
        assert_eq!(seen.is_err(), planted, "{seen:?}");
    }
}

/// An owner's bytes that a device gives to another: what the suite holds to be none. By gather and scatter to a later life
/// of the same name, by copy to another tenant.
fn leaks(bench: &Bench) -> Vec<&'static str> {
    let later = Owner { birth: Birth::from_random(2), ..bench.owner.clone() };
    let other = Owner { tenant: "other".parse().unwrap(), birth: bench.owner.birth };
    let target = |owner: &Owner, bytes: usize| {
        bench.pinned.allocate(owner, keepwarm_types::Bytes(bytes as u64), 1).unwrap().pop().unwrap()
    };
    let refused = |error: &TransferError| {
        assert_eq!((&error.cause, error.targets.len()), (&DeviceError::WrongOwner, 1));
        assert_eq!(error.targets[0].written(), 0, "it was refused after something was written");
    };
    let (out, mut seen) = (Direction::Out, Vec::new());
    let (working, packed) = (pattern(SHAPE.block_bytes()), pattern(SHAPE.packed_bytes(TOKENS)));
    let sources = vec![bench.sealed(&working)];
    let job = GatherJob { shape: SHAPE, sources, tokens: TOKENS, target: target(&later, packed.len()) };
    match bench.device.gather(out, vec![job]) {
        Ok(transfer) => {
            let block = wait(transfer).unwrap().pop().unwrap();
            seen.extend(block.bytes(&later).is_ok().then_some("gather"));
        }
        Err(error) => refused(&error),
    }
    let (source, to) = (bench.sealed(&packed), target(&later, working.len()));
    let job = ScatterJob { shape: SHAPE, source, tokens: TOKENS, target: to };
    match bench.device.scatter(out, vec![job]) {
        Ok(transfer) => {
            let block = wait(transfer).unwrap().pop().unwrap();
            seen.extend(block.bytes().starts_with(&packed[..SHAPE.token_bytes]).then_some("scatter"));
        }
        Err(error) => refused(&error),
    }
    let (source, to) = (bench.sealed(b"of acme"), target(&other, 7));
    match bench.device.submit(out, vec![Job { source, target: to }]) {
        Ok(transfer) => {
            let block = wait(transfer).unwrap().pop().unwrap();
            seen.extend((block.bytes(&other) == Ok(b"of acme")).then_some("copy"));
        }
        Err(error) => refused(&error),
    }
    seen
}

// A guard cannot name a slot that somebody else has: the slot goes back when its last guard drops. What is compared when work
// is submitted is whose bytes the guards are of, tenant and birth, and the birth is the generation of a session's name:
// so this is the generation check of a device, and the one taken out here.
//= GUARANTEES.md#G4
fn a_device_that_asks_for_no_owner_is_seen(kind: Kind) {
    let bench = bench(kind);
    assert_eq!(leaks(&bench), [""; 0]);
    Planted::plant(&bench.faults.planted.knows_no_owner);
    assert_eq!(leaks(&bench), ["gather", "scatter", "copy"]);
}

on_each_device! {
    a_device_that_goes_on_after_an_error_is_seen,
    a_device_that_asks_for_no_owner_is_seen,
}

#[cfg(feature = "cuda")]
mod driver {
    use futures::executor::block_on;
    use keepwarm_types::{Birth, Bytes, Owner};

    use super::super::driver::{CHILD, PATIENCE, bench_with, calls, child_of, order};
    use super::super::streams::until;
    use super::super::{BLOCK, Bench};
    use super::{Planted, serves_nothing_more};
    use crate::device::{Direction, Job, Transfer};
    use crate::guard::Block;

    /// The same for an error of the driver's that does not come again: only the fence keeps later work from being good.
    //= GUARANTEES.md#G9
    #[test]
    fn a_device_that_goes_on_after_an_error_of_its_driver_is_seen() {
        for fault in ["cuMemcpyHtoDAsync_v2 fail 1", "cuMemcpyHtoDAsync_v2 async 719"] {
            for planted in [false, true] {
                let bench = bench_with(PATIENCE);
                if planted {
                    Planted::plant(&bench.faults.planted.fences_nothing);
                }
                if !order(fault) {
                    return;
                }
                assert!(!bench.start(1).unwrap()(), "the error itself is told either way");
                let seen = serves_nothing_more(&bench);
                assert_eq!(seen.is_err(), planted, "after '{fault}': {seen:?}");
            }
        }
    }

    /// Whether a block is what it says, as it arrived and when it is copied out now.
    fn is_sound(bench: &Bench, owner: &Owner, arrived: Transfer) -> bool {
        let Ok(Some(block)) = block_on(arrived).map(|mut blocks: Vec<Block>| blocks.pop()) else {
            return false;
        };
        let target = bench.pinned.allocate(owner, block.capacity(), 1).unwrap().pop().unwrap();
        let job = Job { source: block, target };
        block_on(bench.device.submit(Direction::Out, vec![job]).unwrap()).is_ok()
    }

    /// What ties a copy to the life of its slot is that the batch holds the guards until its event has passed, and that what
    /// is in the slot then has the checksum of the instance. With the guards let go when the batch is issued, the slot goes
    /// to another tenant while the copy is under way: the driver sees the race, and one of the two blocks, which name the
    /// same slot, is not what it says.
    //= GUARANTEES.md#G5
    #[test]
    fn a_slot_that_is_another_s_while_a_copy_still_names_it_is_seen() {
        const NAME: &str = "a_slot_that_is_another_s_while_a_copy_still_names_it_is_seen";
        let Some(word) = std::env::var_os(CHILD) else {
            let races = ("SOFTCUDA_RACES", "report");
            let said = child_of(module_path!(), NAME, "as it is", &[races]);
            assert!(!said.contains("softcuda: race") && said.contains("both are sound"), "{said}");
            let said = child_of(module_path!(), NAME, "planted", &[races]);
            assert!(said.contains("softcuda: race") && said.contains("wrong bytes"), "{said}");
            return;
        };
        let (bench, planted) = (bench_with(PATIENCE), word == "planted");
        if planted {
            Planted::plant(&bench.faults.planted.lets_go_early);
        }
        assert!(order("hang"), "this test is softcuda's");
        let jobs = bench.jobs(&[bench.filled(5)]);
        let (slot, records) = (jobs[0].target.place(), calls("cuEventRecord"));
        let first = bench.device.submit(Direction::In, jobs).unwrap();
        if planted {
            until("the slot", || bench.device.arena().figures().used == Bytes(0));
        }
        let other = Owner { tenant: "other".parse().unwrap(), birth: Birth::from_random(2) };
        let targets = bench.device.arena().allocate(&other, Bytes(BLOCK), 1).unwrap();
        assert_eq!(targets[0].place() == slot, planted, "whose slot is it");
        let second = bench.device.fill(Direction::Out, targets, 7).unwrap();
        // Issued once the copy has been seen to end, it would come after the copy, and be no race.
        until("the fill", || calls("cuEventRecord") == records + 2);
        assert!(order("resume"));
        let sound = [is_sound(&bench, &bench.owner, first), is_sound(&bench, &other, second)];
        println!("{}", if sound == [true; 2] { "both are sound" } else { "wrong bytes" });
    }
}
