//! Ranges as a profiler's library gets them: a small one in C, loaded as a profiler's would be.

use std::path::{Path, PathBuf};
use std::process::Command;

use keepwarm_types::{Birth, Owner};

use super::peer::acts;
use super::regions::{SHAPE, TOKENS, Way, scene};
use super::streams::wait;
use super::{Bench, Kind, bench, on_each_device};
use crate::device::{Direction, Job};

/// Where the library writes to.
const RANGES: &str = "KEEPWARM_TEST_RANGES";
/// As in the headers.
const LIBRARY: &str = "NVTX_INJECTION64_PATH";
/// Set in the process that moves blocks.
const MOVES: &str = "KEEPWARM_TEST_MOVES";

fn library(folder: &Path) -> PathBuf {
    let (source, built) = (folder.join("injection.c"), folder.join("injection.so"));
    std::fs::write(&source, include_str!("injection.c")).unwrap();
    let mut command = Command::new("cc");
    command.args(["-shared", "-fPIC", "-Wall", "-Werror", "-o"]).arg(&built).arg(&source);
    let ended = command.output().expect("a C compiler, as in Debian's package gcc");
    assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
    built
}

/// One move of each kind, and one that a full queue of nothing makes: an empty batch has no range.
fn move_blocks(bench: &Bench) {
    let other = Owner { birth: Birth::from_random(2), ..bench.owner.clone() };
    let block = bench.filled(1);
    let mut jobs = bench.jobs(&[block.clone(), block.clone()]);
    wait(bench.device.submit(Direction::In, Vec::new()).unwrap()).unwrap();
    wait(bench.device.submit(Direction::In, jobs).unwrap()).unwrap();
    jobs = bench.jobs(std::slice::from_ref(&block));
    let target = bench.device.arena().allocate(&other, block.capacity(), 1).unwrap().pop().unwrap();
    jobs.push(Job { source: block.share(other.birth), target });
    bench.faults.flip_after(1);
    wait(bench.device.submit(Direction::Out, jobs).unwrap()).unwrap_err();
    wait(bench.device.fill(Direction::In, vec![bench.target(100)], 7).unwrap()).unwrap();
    wait(bench.device.gather(Direction::Out, vec![bench.gather_job()]).unwrap()).unwrap();
    wait(bench.device.scatter(Direction::In, vec![bench.scatter_job()]).unwrap()).unwrap();
}

/// This test again in a process that moves blocks; its ranges.
fn moved(library: &Path, to: &Path) -> Vec<String> {
    let test = std::thread::current().name().expect("a test's thread has its name").to_owned();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([test.as_str(), "--exact", "--nocapture"]).env(MOVES, "1");
    let ended = command.env(LIBRARY, library).env(RANGES, to).output().unwrap();
    assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
    std::fs::read_to_string(to).unwrap_or_default().lines().map(str::to_owned).collect()
}

/// Begins and ends must match; what the ranges said.
fn said(lines: &[String]) -> Vec<String> {
    let (mut open, mut said) = (Vec::new(), Vec::new());
    for line in lines {
        match line.split(' ').collect::<Vec<_>>()[..] {
            ["begin", "sound", number, ..] => {
                open.push(number.to_owned());
                said.push(line.splitn(4, ' ').last().unwrap().to_owned());
            }
            ["end", "sound", number] => {
                let at = open.iter().position(|other| other == number).expect("a range ends once");
                open.remove(at);
            }
            _ => panic!("the library said '{line}'"),
        }
    }
    assert_eq!(open, [""; 0], "ranges that did not end");
    said
}

fn every_move_has_a_range(kind: Kind) {
    if std::env::var_os(MOVES).is_some() {
        move_blocks(&bench(kind));
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let built = library(folder.path());
    let owner = format!("acme/{}", Birth::from_random(1));
    let expected = [
        format!("keepwarm|200000|copy in: pinned -> hbm:0, 2 blocks, 200000 bytes, {owner}"),
        format!("keepwarm|200000|copy out: pinned -> hbm:0, 2 blocks, 200000 bytes, {owner} and others"),
        format!("keepwarm|100|fill in: a byte -> hbm:0, 1 blocks, 100 bytes, {owner}"),
        format!("keepwarm|600|gather out: pinned -> hbm:0, 1 blocks, 600 bytes, {owner}"),
        format!("keepwarm|600|scatter in: pinned -> hbm:0, 1 blocks, 600 bytes, {owner}"),
    ];
    assert_eq!(said(&moved(&built, &folder.path().join("ranges"))), expected);
    // A library that is not there, and one that does not want to, do no harm.
    assert_eq!(moved(Path::new("/not/there.so"), &folder.path().join("none")), [""; 0]);
    assert_eq!(moved(&built, Path::new("/not/there/either")), [""; 0]);
}

fn moves_of_regions(kind: Kind) {
    if acts() {
        return;
    }
    if std::env::var_os(MOVES).is_some() {
        let way = match kind {
            Kind::Host => Way::HostShared,
            #[cfg(feature = "cuda")]
            Kind::Cuda => Way::CudaShared,
        };
        let scene = scene(way, bench(kind));
        let block = wait(scene.gather().unwrap()).unwrap().pop().unwrap();
        let job = crate::RegionScatterJob {
            shape: SHAPE,
            source: block,
            owner: scene.bench.owner.clone(),
            tokens: TOKENS,
            targets: vec![scene.planes(0, SHAPE.planes)],
        };
        wait(scene.bench.device.scatter_into(Direction::In, vec![job]).unwrap()).unwrap();
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let owner = format!("acme/{}", Birth::from_random(1));
    let expected = [
        format!("keepwarm|800|gather out: region -> hbm:0, 1 blocks, 800 bytes, {owner}"),
        format!("keepwarm|800|scatter in: hbm:0 -> region, 1 blocks, 800 bytes, {owner}"),
    ];
    assert_eq!(said(&moved(&library(folder.path()), &folder.path().join("ranges"))), expected);
}

fn a_range_lasts_until_the_batch_is_through(kind: Kind) {
    if std::env::var_os(MOVES).is_some() {
        let bench = bench(kind);
        let written = || std::fs::read_to_string(std::env::var_os(RANGES).unwrap()).unwrap_or_default();
        bench.faults.hang(true);
        let transfer = bench.device.fill(Direction::In, vec![bench.target(100)], 7).unwrap();
        let begun = written();
        assert!(begun.starts_with("begin") && !begun.contains("end sound"), "{begun}");
        bench.faults.hang(false);
        wait(transfer).unwrap();
        assert!(written().contains("end sound"), "it ends before its end is told");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let lines = moved(&library(folder.path()), &folder.path().join("ranges"));
    assert_eq!(said(&lines).len(), 1);
}

on_each_device! { every_move_has_a_range, moves_of_regions, a_range_lasts_until_the_batch_is_through }
