//! Links between two GPUs, and GPUs between which there are none.

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use keepwarm_types::{Birth, Bytes, Owner};

use super::driver::{CHILD, PATIENCE, calls, child_of, counted, loaded, order};
use super::planted::serves_nothing_more;
use super::streams::{until, wait};
use super::{BLOCK, Bench, Kind, bench};
use crate::arena::ArenaSettings;
use crate::device::{
    CudaDevice, CudaSelector, Device, DeviceError, DeviceState, Direction, Job, Link, LinkError,
    STREAM_QUEUE_MAX,
};
use crate::fault::{FaultPlan, Planted};
use crate::guard::{Block, BlockMut};

/// Two GPUs, each with pinned memory of its own.
struct Pair {
    source: Bench,
    target: Bench,
}

fn bench_of(number: u32, patience: Duration) -> Bench {
    let faults = Arc::new(FaultPlan::default());
    let settings =
        |name: String| ArenaSettings { extent: Bytes(1 << 20), ..ArenaSettings::new(name, Bytes(4 << 20)) };
    let (selector, hbm) = (CudaSelector::Number(number), settings(format!("hbm:{number}")));
    let device = CudaDevice::open(&loaded().driver, &selector, &hbm, Arc::clone(&faults), patience).unwrap();
    let pinned = device.page_locked(&settings(format!("pinned:{number}"))).unwrap();
    let owner = Owner { tenant: "acme".parse().unwrap(), birth: Birth::from_random(1) };
    Bench { owner, pinned, device: Arc::new(device), faults }
}

/// None on a machine with one GPU.
fn pair(patience: Duration) -> Option<Pair> {
    if loaded().driver.devices().unwrap().len() < 2 {
        println!("skipped: there is one GPU");
        return None;
    }
    Some(Pair { source: bench_of(0, patience), target: bench_of(1, patience) })
}

impl Pair {
    fn link(&self) -> Link {
        self.source.device.link_to(&*self.target.device).unwrap()
    }

    /// Blocks on the source, each of another byte.
    fn blocks(&self, count: usize) -> Vec<Block> {
        let pinned: Vec<_> = (0..count).map(|n| self.source.filled(n as u8 + 1)).collect();
        wait(self.source.device.submit(Direction::In, self.source.jobs(&pinned)).unwrap()).unwrap()
    }

    /// Jobs from there to the target.
    fn jobs(&self, sources: &[Block]) -> Vec<Job> {
        self.target.jobs(sources)
    }
}

/// Whether a device still does what it did.
fn serves(bench: &Bench) -> bool {
    let sources = [bench.filled(77)];
    let copied = bench.device.submit(Direction::In, bench.jobs(&sources)).map(wait);
    copied.is_ok_and(|copied| copied.is_ok_and(|blocks| bench.read(&blocks[0]) == [77; BLOCK as usize]))
}

#[test]
fn blocks_go_straight_and_arrive_verified_as_the_same_instances() {
    let Some(pair) = pair(PATIENCE) else { return };
    let (link, sources) = (pair.link(), pair.blocks(5));
    let mut there = Vec::new();
    let cost = counted(|| there = wait(link.copy(pair.jobs(&sources)).unwrap()).unwrap());
    for (source, copy) in sources.iter().zip(&there) {
        assert_eq!((source.instance(), source.checksum()), (copy.instance(), copy.checksum()));
        assert_eq!(
            (source.owner(), copy.owner(), copy.arena()),
            (pair.source.owner.clone(), copy.owner(), "hbm:1")
        );
        assert_eq!(pair.source.read(source), pair.target.read(copy));
    }
    let through_the_host = |(symbol, _): &(&str, u64)| symbol.contains("HtoD") || symbol.contains("DtoH");
    assert!(!cost.iter().any(through_the_host), "{cost:?}");
    assert!(link.scratch().used > Bytes(0) && format!("{link:?}") == "Link(hbm:0 -> hbm:1)");

    // Another the same way, which the driver says is open already, and one back.
    let again = pair.link();
    let back = pair.target.device.link_to(&*pair.source.device).unwrap();
    let home = wait(back.copy(pair.source.jobs(&there)).unwrap()).unwrap();
    assert_eq!(pair.source.read(&home[4]), vec![5; BLOCK as usize]);
    assert!(wait(again.copy(pair.jobs(&home)).unwrap()).is_ok());
    assert!(wait(link.copy(Vec::new()).unwrap()).unwrap().is_empty());
    drop((sources, there, home));
    until("all memory", || pair.source.used() == 0 && pair.target.used() == 0);
}

#[test]
fn a_batch_between_devices_costs_as_many_driver_calls_whatever_its_length() {
    // Without a rest, so that blocks lie together.
    const WHOLE: u64 = 64 << 10;
    let Some(pair) = pair(PATIENCE) else { return };
    if loaded().soft.is_none() {
        println!("skipped: a real driver does not count its calls");
        return;
    }
    let link = pair.link();
    let costs = [2, 16].map(|count| {
        let room = |bench: &Bench| bench.device.arena().allocate(&bench.owner, Bytes(WHOLE), count).unwrap();
        let sources = wait(pair.source.device.fill(Direction::In, room(&pair.source), 7).unwrap()).unwrap();
        let jobs = sources.into_iter().zip(room(&pair.target)).map(|(source, target)| Job { source, target });
        let jobs = jobs.collect();
        counted(|| assert_eq!(wait(link.copy(jobs).unwrap()).unwrap().len(), count))
    });
    assert_eq!(costs[0], costs[1], "a longer batch costs more calls");
    let all = costs[0].iter().filter(|(symbol, _)| symbol.contains("Memcpy")).collect::<Vec<_>>();
    assert_eq!(all, [&("cuMemcpyPeerAsync", 1)], "{:?}", costs[0]);
}

/// What opening a link says on a machine, both ways.
fn ways(machine: &str) -> String {
    const NAME: &str = "devices_without_a_way_say_so_and_the_caller_goes_through_pinned_memory";
    child_of(module_path!(), NAME, "ways", &[("SOFTCUDA_DEVICES", machine)])
}

#[test]
fn devices_without_a_way_say_so_and_the_caller_goes_through_pinned_memory() {
    if std::env::var_os(CHILD).is_some() {
        let pair = pair(PATIENCE).unwrap();
        for (from, to) in [(&pair.source, &pair.target), (&pair.target, &pair.source)] {
            println!("told: {:?}", from.device.link_to(&*to.device).map_err(|error| error.to_string()));
        }
        println!("peers enabled {} times", calls("cuCtxEnablePeerAccess"));
        // What is to be done instead.
        let sources = pair.blocks(1);
        let pinned = pair.source.pinned.allocate(&pair.source.owner, Bytes(BLOCK), 1).unwrap().pop().unwrap();
        let out = Job { source: sources[0].clone(), target: pinned };
        let pinned = wait(pair.source.device.submit(Direction::Out, vec![out]).unwrap()).unwrap();
        let there = wait(pair.target.device.submit(Direction::In, pair.jobs(&pinned)).unwrap()).unwrap();
        assert_eq!(pair.target.read(&there[0]), [1; BLOCK as usize]);
        return;
    }
    let no = |from, to| {
        format!(
            "told: Err(\"hbm:{from} does not reach hbm:{to} (the driver shows no peer access between them): copy through pinned memory\")"
        )
    };
    let said = ways("gpus=2,peers=none,uuids=process");
    assert!(said.contains(&no(0, 1)) && said.contains(&no(1, 0)), "{said}");
    assert!(said.contains("peers enabled 0 times"), "{said}");
    let mut machine = tempfile::Builder::new().suffix(".toml").tempfile().unwrap();
    write!(machine, "[[gpu]]\npeers = [1]\n[[gpu]]\npeers = []\n").unwrap();
    let said = ways(machine.path().to_str().unwrap());
    assert!(said.contains("told: Ok(Link(hbm:0 -> hbm:1))") && said.contains(&no(1, 0)), "{said}");
}

#[test]
fn a_link_is_refused_for_each_reason_by_name() {
    let Some(pair) = pair(PATIENCE) else { return };
    let (there, host) = (&*pair.target.device, bench(Kind::Host));
    let refused = |from: &dyn Device, to: &dyn Device| from.link_to(to).unwrap_err();
    for error in [refused(there, &*host.device), refused(&*host.device, there)] {
        assert!(error.to_string().contains("only between CUDA devices there are links"), "{error}");
    }
    assert!(matches!(refused(there, there), LinkError::NotPossible { .. }));
    if order("cuCtxEnablePeerAccess fail 711") {
        let error = refused(&*pair.source.device, there);
        assert!(matches!(&error, LinkError::NotPossible { why, .. } if why.contains("711")), "{error}");
        assert!(order("cuCtxEnablePeerAccess fail 719"));
        let error = refused(&*pair.source.device, there);
        assert!(
            error.to_string().contains("could not be made: cuCtxEnablePeerAccess answered 719"),
            "{error}"
        );
        assert!(order("cuStreamCreate fail 2"));
        assert!(matches!(refused(&*pair.source.device, there), LinkError::Failed { .. }));
    }
    assert!(serves(&pair.source) && serves(&pair.target));
    pair.target.device.fence("over");
    let fenced = LinkError::Fenced { device: "hbm:1".to_owned(), reason: "over".to_owned() };
    assert_eq!(refused(&*pair.source.device, there), fenced);
    assert_eq!(refused(there, &*pair.source.device), fenced);
}

#[test]
fn what_does_not_belong_to_a_link_is_refused_before_anything_is_copied() {
    let Some(pair) = pair(PATIENCE) else { return };
    let (link, sources) = (pair.link(), pair.blocks(2));
    let refused = |source: &Block, target: BlockMut| {
        let jobs = vec![pair.jobs(&sources[..1]).pop().unwrap(), Job { source: source.clone(), target }];
        let error = link.copy(jobs).unwrap_err();
        assert!(error.targets.len() == 2 && error.targets.iter().all(|target| target.written() == 0));
        error.cause
    };
    let target = |bench: &Bench| bench.target(BLOCK as usize);
    for (source, target) in [
        (&sources[1], target(&pair.source)),
        (&pair.source.filled(1), target(&pair.target)),
        (&sources[1], pair.target.room(&pair.target.pinned, BLOCK as usize)),
    ] {
        let cause = refused(source, target);
        assert!(cause.to_string().contains("is no way from hbm:0 to hbm:1"), "{cause}");
    }
    assert!(matches!(refused(&sources[1], pair.target.target(100)), DeviceError::Size { target: 100, .. }));
    let other = Owner { tenant: "other".parse().unwrap(), birth: pair.source.owner.birth };
    let theirs = pair.target.device.arena().allocate(&other, Bytes(BLOCK), 1).unwrap().pop().unwrap();
    assert_eq!(refused(&sources[1], theirs), DeviceError::WrongOwner);

    // Full, and fenced ones of each side while work is queued and afterwards.
    pair.source.faults.hang(true);
    let mut queued = Vec::new();
    let error = loop {
        match link.copy(Vec::new()) {
            Ok(transfer) => queued.push(transfer),
            Err(error) => break error,
        }
        assert!(queued.len() <= STREAM_QUEUE_MAX + 1, "the queue has no bound");
    };
    assert_eq!(error.cause, DeviceError::Busy);
    pair.source.device.fence("over");
    pair.source.faults.hang(false);
    for (cause, what) in [
        (wait(queued.pop().unwrap()).unwrap_err().cause, "queued"),
        (link.copy(pair.jobs(&sources)).unwrap_err().cause, "submitted"),
    ] {
        assert!(
            matches!(&cause, DeviceError::Gone(why) if why.contains("is fenced: over")),
            "{what}: {cause}"
        );
    }
    pair.target.device.fence("over too");
    let back = link.copy(pair.jobs(&sources)).unwrap_err().cause;
    assert!(matches!(back, DeviceError::Gone(_)), "{back}");
    until("the targets", || pair.target.used() == 0);
}

/// A fault, and on whose side: which device it fences, if any.
const FAULTS: [(&str, Option<bool>); 8] = [
    ("cuMemcpyPeerAsync corrupt 777", None),
    ("cuMemcpyPeerAsync fail 1", Some(true)),
    ("cuMemcpyPeerAsync async-sticky 700", Some(true)),
    ("cuEventRecord fail 2 device=0", Some(true)),
    ("lose 999 device=0", Some(true)),
    ("cuLaunchKernel sticky 719 device=1", Some(false)),
    ("cuEventQuery sticky 214 device=1", Some(false)),
    ("lose 999 device=1", Some(false)),
];

/// In a process of its own each: a context that was broken stays so.
#[test]
fn a_fault_on_either_side_fences_that_side_alone() {
    const NAME: &str = "a_fault_on_either_side_fences_that_side_alone";
    let Some(word) = std::env::var_os(CHILD) else {
        if loaded().soft.is_some() {
            (0..FAULTS.len()).for_each(|fault| drop(child_of(module_path!(), NAME, &fault.to_string(), &[])));
        }
        return;
    };
    let (fault, of_source) = FAULTS[word.to_str().unwrap().parse::<usize>().unwrap()];
    let pair = pair(PATIENCE).unwrap();
    let (link, sources) = (pair.link(), pair.blocks(3));
    assert!(wait(link.copy(pair.jobs(&sources)).unwrap()).is_ok(), "before '{fault}'");
    assert!(order(fault));
    let error = wait(link.copy(pair.jobs(&sources)).unwrap()).unwrap_err();
    match of_source {
        None => {
            assert!(matches!(error.cause, DeviceError::Corrupt(_)), "'{fault}': {error}");
            assert!(wait(link.copy(pair.jobs(&sources)).unwrap()).is_ok());
        }
        Some(true) => assert!(matches!(error.cause, DeviceError::Gone(_)), "'{fault}': {error}"),
        Some(false) => assert!(matches!(error.cause, DeviceError::Fenced(_)), "'{fault}': {error}"),
    }
    drop(error);
    for (bench, is_hit) in [(&pair.source, of_source == Some(true)), (&pair.target, of_source == Some(false))]
    {
        assert_eq!(bench.device.state() == DeviceState::Up, !is_hit, "'{fault}': {:?}", bench.device);
        let whole = if is_hit { serves_nothing_more(bench) == Ok(()) } else { serves(bench) };
        assert!(whole, "after '{fault}': {:?}", bench.device);
    }
    if of_source.is_some() {
        assert!(
            link.copy(pair.jobs(&sources)).is_err(),
            "a link with a fenced end took work after '{fault}'"
        );
    }
    assert_eq!(pair.target.used(), 0, "after '{fault}'");
}

#[test]
fn a_source_that_hangs_does_not_hold_its_target_up() {
    let Some(pair) = pair(Duration::from_secs(2)) else { return };
    let (link, sources) = (pair.link(), pair.blocks(1));
    if !order("hang device=0") {
        return;
    }
    let transfer = link.copy(pair.jobs(&sources)).unwrap();
    assert!(serves(&pair.target), "while its source hangs");
    let error = wait(transfer).unwrap_err();
    assert!(matches!(&error.cause, DeviceError::Gone(why) if why.contains("it hangs")), "{error}");
    assert!(error.targets.is_empty(), "memory came back that a copy may still write");
    assert!(matches!(pair.source.device.state(), DeviceState::Fenced(_)));
    assert!(serves(&pair.target) && pair.target.used() > 0);
    drop((error, sources));
    assert!(pair.source.used() > 0, "memory was given back that a copy may still read");
    assert!(order("resume device=0"));
    until("all memory", || pair.source.used() == 0 && pair.target.used() == 0);
}

#[test]
fn a_target_that_hangs_does_not_hold_its_source_up() {
    let Some(pair) = pair(Duration::from_secs(2)) else { return };
    let (link, sources) = (pair.link(), pair.blocks(1));
    if !order("hang device=1") {
        return;
    }
    let error = wait(link.copy(pair.jobs(&sources)).unwrap()).unwrap_err();
    assert!(matches!(&error.cause, DeviceError::Fenced(why) if why.contains("it hangs")), "{error}");
    assert!(serves(&pair.source));
    assert!(matches!(pair.target.device.state(), DeviceState::Fenced(_)));
    assert!(matches!(link.copy(pair.jobs(&sources)).unwrap_err().cause, DeviceError::Fenced(_)));
    assert!(order("resume device=1"));
    until("all memory", || pair.target.used() == 0);
}

#[test]
fn what_was_submitted_runs_whoever_drops() {
    let Some(pair) = pair(PATIENCE) else { return };
    let (link, sources) = (pair.link(), pair.blocks(2));
    pair.source.faults.hang(true);
    let (kept, dropped) = (link.copy(pair.jobs(&sources)).unwrap(), link.copy(pair.jobs(&sources)).unwrap());
    drop((link, dropped, sources));
    let (here, there) = (pair.source.device.arena().clone(), pair.target.device.arena().clone());
    assert!(here.figures().used > Bytes(0) && there.figures().used > Bytes(0));
    let faults = Arc::clone(&pair.source.faults);
    drop(pair);
    assert!(kept.now_or_never().is_none());
    faults.hang(false);
    until("all memory", || here.figures().used == Bytes(0) && there.figures().used == Bytes(0));
}

/// The test of the tests: what orders the target's reading behind the source's copy is the event that is waited for.
#[test]
fn a_copy_between_devices_that_is_not_waited_for_does_not_pass_for_sound() {
    const NAME: &str = "a_copy_between_devices_that_is_not_waited_for_does_not_pass_for_sound";
    let Some(word) = std::env::var_os(CHILD) else {
        if loaded().soft.is_none() {
            return;
        }
        let races = ("SOFTCUDA_RACES", "report");
        let said = child_of(module_path!(), NAME, "as it is", &[races]);
        assert!(!said.contains("softcuda: race") && said.contains("came as sound"), "{said}");
        let said = child_of(module_path!(), NAME, "planted", &[races]);
        assert!(said.contains("softcuda: race") && said.contains("came as corrupt"), "{said}");
        return;
    };
    let pair = pair(PATIENCE).unwrap();
    let (link, sources) = (pair.link(), pair.blocks(1));
    if word == "planted" {
        Planted::plant(&pair.target.faults.planted.waits_for_nothing);
    }
    assert!(order("cuMemcpyPeerAsync delay 1000"), "this test is softcuda's");
    match wait(link.copy(pair.jobs(&sources)).unwrap()) {
        Ok(_) => println!("came as sound"),
        Err(error) if matches!(error.cause, DeviceError::Corrupt(_)) => println!("came as corrupt"),
        Err(error) => panic!("{error}"),
    }
}
