//! A management library that is not there, a small one in C, and a fake that fails in each call; the environment's limits.

use keepwarm_types::Bytes;
use proptest::prelude::{any, prop_assert_eq, proptest};

use super::ask::{Answer, GPUS_MAX, INSTANCES_MAX, PROCESSES_MAX, Silence, Source, Which, report};
use super::*;

/// A GPU that can be cut, with answers that fail on order.
#[derive(Default)]
struct Fake {
    fails: Option<&'static str>,
    gpus: u32,
}

impl Fake {
    fn answer<T>(&self, call: &str, answer: T) -> Answer<T> {
        match self.fails {
            Some(fails) if fails == call => Err(Silence::Failed("it is lost".to_owned())),
            _ => Ok(answer),
        }
    }
}

impl Source for Fake {
    fn driver(&self) -> Answer<String> {
        self.answer("driver", "1.2".to_owned())
    }
    fn gpus(&self) -> Answer<u32> {
        self.answer("gpus", self.gpus)
    }
    fn instances(&self, _gpu: u32) -> Answer<u32> {
        self.answer("instances", u32::MAX)
    }
    fn name(&self, which: Which) -> Answer<String> {
        self.answer("name", format!("{which:?}"))
    }
    fn uuid(&self, which: Which) -> Answer<String> {
        match which {
            Which::Gpu(gpu) => self.answer("uuid", format!("GPU-{gpu}")),
            Which::Instance(_, 1) => Err(Silence::NoSuch),
            Which::Instance(gpu, at) => self.answer("instance", format!("MIG-{gpu}-{at}")),
        }
    }
    fn memory(&self, _which: Which) -> Answer<NvmlMemory> {
        self.answer("memory", NvmlMemory { total: Bytes(100), used: Bytes(10) })
    }
    fn processes(&self, _which: Which) -> Answer<Vec<NvmlProcess>> {
        self.answer("processes", vec![NvmlProcess { process: 1, used: None }; PROCESSES_MAX + 1])
    }
    fn mig(&self, gpu: u32) -> Answer<MigMode> {
        self.answer("mig", MigMode { enabled: gpu == 0, pending: false })
    }
}

#[test]
fn lists_are_bounded_and_instances_that_are_not_there_are_left_out() {
    let report = report(&Fake { gpus: 1000, fails: None });
    assert_eq!((report.driver.as_str(), report.gpus.len()), ("1.2", GPUS_MAX as usize));
    assert_eq!(report.gpus[0].instances.len(), INSTANCES_MAX as usize - 1);
    assert_eq!(report.gpus[0].instances[1].uuid, "MIG-0-2");
    assert!(report.gpus[1].instances.is_empty() && report.unanswered.is_empty());
    assert_eq!(report.gpus[0].processes.len(), PROCESSES_MAX);
    let there = Nvml::There(report);
    assert_eq!(there.device("mig-0-2").map(|device| device.number), None, "a prefix is written as it is");
    assert_eq!(there.device("0-2").map(|device| device.number), Some(2));
    assert_eq!(there.device("GPU-63").map(|device| device.number), Some(63));
}

#[test]
fn what_is_not_answered_is_said_and_costs_no_more_than_that() {
    let whole = report(&Fake { gpus: 2, fails: None });
    for fails in ["driver", "gpus", "instances", "name", "uuid", "instance", "memory", "processes", "mig"] {
        let report = report(&Fake { gpus: 2, fails: Some(fails) });
        assert!(!report.unanswered.is_empty(), "'{fails}' failed in silence");
        assert!(report.unanswered.iter().all(|why| why.ends_with(": it is lost")), "{:?}", report.unanswered);
        let gpus = if ["gpus", "uuid"].contains(&fails) { 0 } else { whole.gpus.len() };
        assert_eq!(report.gpus.len(), gpus, "after '{fails}' failed");
        assert_eq!(report.driver.is_empty(), fails == "driver");
        for (gpu, other) in report.gpus.iter().zip(&whole.gpus) {
            assert_eq!(gpu.memory.is_none(), fails == "memory");
            assert_eq!(gpu.processes.is_empty(), fails == "processes");
            assert_eq!(gpu.mig.is_none(), fails == "mig");
            let none = ["mig", "instances", "instance"].contains(&fails);
            assert_eq!(gpu.instances.len(), if none { 0 } else { other.instances.len() }, "{fails}");
        }
    }
}

#[cfg(feature = "nvml")]
#[test]
fn a_library_that_is_not_there_is_said_to_be_not_there() {
    let Nvml::NotThere(why) = nvml::look("libnvidia-ml-of-nobody.so.1") else { panic!("it was found") };
    assert!(why.contains("libnvidia-ml-of-nobody.so.1"), "{why}");
    // This machine's own, if it has one.
    match Nvml::look() {
        Nvml::NotThere(why) => assert!(why.contains(nvml::LIBRARY), "{why}"),
        Nvml::There(report) => assert!(!report.driver.is_empty(), "{report:?}"),
    }
    assert_eq!(Nvml::NotThere(String::new()).device("GPU-1"), None);
}

#[cfg(feature = "nvml")]
#[test]
fn a_library_is_read_as_its_headers_say() {
    const FAKE: &str = "NVML_FAKE";
    const BUILT: &str = "KEEPWARM_TEST_NVML";
    if let Some(library) = std::env::var_os(BUILT) {
        let Nvml::NotThere(why) = nvml::look(&library) else { panic!("it started") };
        assert!(why.ends_with("library.so: NVIDIA driver is not loaded"), "{why}");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (source, built) = (folder.path().join("nvml.c"), folder.path().join("library.so"));
    std::fs::write(&source, include_str!("nvml.c")).unwrap();
    let mut command = std::process::Command::new("cc");
    command.args(["-shared", "-fPIC", "-Wall", "-Werror", "-o"]).arg(&built).arg(&source);
    let ended = command.output().expect("a C compiler, as in Debian's package gcc");
    assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));

    let Nvml::There(report) = nvml::look(&built) else { panic!("it was not found") };
    let memory =
        |total: u64, used: u64| Some(NvmlMemory { total: Bytes(total << 30), used: Bytes(used + (1 << 20)) });
    let device = |number, name: &str, uuid: &str, memory| NvmlDevice {
        number,
        name: name.to_owned(),
        uuid: uuid.to_owned(),
        memory,
        processes: Vec::new(),
        mig: None,
        instances: Vec::new(),
    };
    let used = |process, used| NvmlProcess { process, used };
    let whole = NvmlDevice {
        processes: vec![used(4711, Some(Bytes(1 << 30))), used(4712, None)],
        ..device(0, "Whole", "GPU-00112233-4455-6677-8899-aabbccddeeff", memory(80, 3 << 30))
    };
    let cut = NvmlDevice {
        mig: Some(MigMode { enabled: true, pending: false }),
        instances: vec![
            device(0, "Cut MIG 1g.10gb", "MIG-0123abcd-0000-1111-2222-333344445555", memory(10, 1 << 20)),
            device(2, "Cut MIG 2g.20gb", "MIG-0123abcd-9999-1111-2222-333344445555", memory(20, 2 << 20)),
        ],
        ..device(1, "Cut", "GPU-11112233-4455-6677-8899-aabbccddeeff", memory(80, 5 << 30))
    };
    assert_eq!((report.driver.as_str(), &report.gpus[..]), ("570.124.06", &[whole, cut][..]));
    assert_eq!(report.unanswered.len(), 1, "{:?}", report.unanswered);
    assert!(report.unanswered[0].starts_with("the processes of GPU 1: "), "{:?}", report.unanswered);

    // One that does not start: its environment is a process's.
    let test = std::thread::current().name().expect("a test's thread has its name").to_owned();
    let mut again = std::process::Command::new(std::env::current_exe().unwrap());
    again.args([test.as_str(), "--exact", "--nocapture"]).env(FAKE, "init").env(BUILT, &built);
    let ended = again.output().unwrap();
    assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
}

#[test]
fn limits_are_read_and_what_is_no_limit_is_named() {
    let uuid = "00112233-4455-6677-8899-aabbccddeeff";
    let list = format!("0=1G, 1=512M,GPU-{uuid}=3gb,1=2G");
    let limits = MpsLimits::parse(Some(&list), Some("25")).unwrap();
    assert_eq!(limits.active_threads, Some(25.0));
    assert_eq!(limits.memory_of(0, "other"), Some(Bytes(1 << 30)));
    assert_eq!(limits.memory_of(1, "other"), Some(Bytes(512 << 20)), "the smaller of two");
    assert_eq!(limits.memory_of(2, &uuid.to_uppercase()), Some(Bytes(3 << 30)));
    assert_eq!(limits.memory_of(2, "other"), None);
    for nothing in [None, Some(""), Some("  ")] {
        assert_eq!(MpsLimits::parse(nothing, nothing), Ok(MpsLimits::default()));
    }
    for text in
        ["1G", "0=", "0=1", "0=1T", "0=-1G", "x=1G", "0=1G,", "0=99999999999999G", &"0=1G,".repeat(100)]
    {
        let error = MpsLimits::parse(Some(text), None).unwrap_err().to_string();
        assert!(
            error.starts_with("CUDA_MPS_PINNED_DEVICE_MEM_LIMIT=") && error.contains("0=1G,1=512M"),
            "{error}"
        );
    }
    for text in ["0", "101", "-1", "NaN", "half", "inf"] {
        let error = MpsLimits::parse(None, Some(text)).unwrap_err().to_string();
        assert!(error.starts_with("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE="), "{error}");
    }
}

proptest! {
    #[test]
    fn any_text_is_limits_or_an_error(text in any::<String>(), number in 0u32..64, mib in 1u64..1_000_000) {
        let _ = MpsLimits::parse(Some(&text), Some(&text));
        let limits = MpsLimits::parse(Some(&format!("{number}={mib}M")), None).unwrap();
        prop_assert_eq!(limits.memory_of(number, ""), Some(Bytes(mib << 20)));
    }
}
