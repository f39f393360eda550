//! The other process of the tests of regions: the test's own program once more, which brings memory and does as it is told,
//! line by line.

use std::fs::File;
use std::io::{BufRead, BufReader, Lines, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use keepwarm_types::Bytes;
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};

use crate::checksum::block_checksum;
use crate::foreign::{Brought, Peer};

/// Set in the other process: what it brings.
const BRINGS: &str = "KEEPWARM_TEST_BRINGS";
/// What it says begins like this; the test harness talks as well.
const SAYS: &str = "peer: ";
/// Bytes of what it brings.
pub(super) const REGION: usize = 200_000;

/// Bytes that differ from seed to seed and from place to place.
pub(super) fn image(seed: u8) -> Vec<u8> {
    (0..REGION).map(|at| (at % 251) as u8 ^ (at / 251) as u8 ^ seed).collect()
}

/// Memory that the other process brings.
pub(super) trait Memory {
    fn name(&self) -> String;
    fn fill(&mut self, bytes: &[u8]);
    fn read(&self) -> Vec<u8>;
    fn free(&mut self) {}
}

/// Shared memory as it should be brought, sealed if `sealed`.
pub(super) fn shared_memory(bytes: usize, sealed: bool) -> File {
    let fd =
        rustix::fs::memfd_create("keepwarm-test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::fallocate(&fd, FallocateFlags::empty(), 0, bytes as u64).unwrap();
    if sealed {
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
    }
    File::from(fd)
}

impl Memory for File {
    fn name(&self) -> String {
        self.as_raw_fd().to_string()
    }

    fn fill(&mut self, bytes: &[u8]) {
        self.write_all_at(bytes, 0).unwrap();
    }

    fn read(&self) -> Vec<u8> {
        let mut bytes = vec![0; REGION];
        self.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }
}

/// In the other process: does what it is told until its input ends. Tells whether this is the other process.
pub(super) fn acts() -> bool {
    let Ok(brings) = std::env::var(BRINGS) else { return false };
    let mut memory: Box<dyn Memory> = match brings.as_str() {
        "shared" => Box::new(shared_memory(REGION, true)),
        #[cfg(feature = "cuda")]
        "cuda" => Box::new(super::regions_cuda::Exported::new()),
        other => panic!("nothing is called {other}"),
    };
    println!("{SAYS}{}", memory.name());
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let (word, number) = line.split_once(' ').unwrap_or((&line, "0"));
        let number: u8 = number.parse().unwrap();
        match word {
            "fill" => memory.fill(&image(number)),
            // So many times over, with other bytes each time: somebody reads meanwhile.
            "scribble" => {
                println!("{SAYS}begins");
                (0..number).for_each(|seed| memory.fill(&image(seed)));
            }
            "read" => {}
            "free" => memory.free(),
            other => panic!("nothing is called {other}"),
        }
        let sum = if word == "free" { String::new() } else { block_checksum(&memory.read()).to_string() };
        println!("{SAYS}{sum}");
    }
    true
}

/// The other process, as the test sees it; killed when this drops.
pub(super) struct Bringer {
    child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
    /// What its memory is called.
    name: String,
    /// The GPU that it lies on.
    device: String,
}

impl Drop for Bringer {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Bringer {
    /// Starts it: this test again. `device`: the UUID of the GPU whose memory it brings.
    pub(super) fn start(brings: &str, device: &str) -> Self {
        let test = std::thread::current().name().expect("a test's thread has its name").to_owned();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args([test.as_str(), "--exact", "--nocapture"]).env(BRINGS, brings);
        let machine = tempfile::Builder::new().suffix(".toml").tempfile().unwrap();
        if !device.is_empty() {
            write!(machine.as_file(), "[[gpu]]\nmemory = \"64MiB\"\nuuid = \"GPU-{device}\"\n").unwrap();
            command.env("SOFTCUDA_DEVICES", machine.path());
        }
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut bringer = Self { child, input, output, name: String::new(), device: device.to_owned() };
        bringer.name = bringer.hear();
        bringer
    }

    /// What it says next.
    pub(super) fn hear(&mut self) -> String {
        let said = self.output.by_ref().map(|line| line.expect("it speaks text"));
        let said = said.filter_map(|line| line.split_once(SAYS).map(|(_, said)| said.to_owned()));
        said.take(1).next().expect("the other process ended early")
    }

    /// Tells it to do something, and does not wait.
    pub(super) fn tell(&mut self, word: &str) {
        writeln!(self.input, "{word}").unwrap();
    }

    /// Has it do something; what it says: the checksum of its memory.
    pub(super) fn does(&mut self, word: &str) -> String {
        self.tell(word);
        self.hear()
    }

    /// Its memory must be these bytes.
    pub(super) fn has(&mut self, bytes: &[u8]) {
        assert_eq!(self.does("read"), block_checksum(bytes).to_string(), "its memory is another");
    }

    /// As `SIGKILL` does it, and until it is really gone.
    pub(super) fn kill(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }

    /// Watches it.
    pub(super) fn peer(&self) -> Peer {
        Peer::watch_process(self.child.id()).unwrap()
    }

    /// What it brings, said to have so many bytes.
    pub(super) fn brings(&self, bytes: usize) -> Brought {
        let bytes = Bytes(bytes as u64);
        if self.device.is_empty() {
            let path = format!("/proc/{}/fd/{}", self.child.id(), self.name);
            let file = File::options().read(true).write(true).open(path).unwrap();
            return Brought::SharedMemory { fd: OwnedFd::from(file), bytes };
        }
        let digits = |at: usize| u8::from_str_radix(&self.name[2 * at..2 * at + 2], 16).unwrap();
        let handle = std::array::from_fn(digits);
        Brought::CudaIpc { handle, device: format!("GPU-{}", self.device), bytes }
    }
}
