//! The description of the machine that is played: GPUs, MIG instances, driver. Parsed from the settings
//! once, at `cuInit`; owns no state.

use serde::Deserialize;

use crate::settings;

/// GPUs that a description may have: as many as the largest single hosts.
pub const DEVICES_MAX: usize = 64;
/// Memory that one device may have: 1 TiB of address space each still fits 47 bits with all devices.
pub const MEMORY_MAX: u64 = 1 << 40;
/// Memory of a device where nothing is said.
const MEMORY_DEFAULT: u64 = 1 << 30;
/// The driver's version where nothing is said: CUDA 12.8.
const DRIVER_DEFAULT: i32 = 12_080;
/// `CUDA_ERROR_STUB_LIBRARY`: what a toolkit's `libcuda` answers where no driver is installed.
const STUB_LIBRARY: u32 = 34;

/// Why a description was refused.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct DescriptionError(String);

fn refuse<T>(message: impl Into<String>) -> Result<T, DescriptionError> {
    Err(DescriptionError(message.into()))
}

/// What can be seen of one device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceDescription {
    /// As `cuDeviceGetName` gives it.
    pub name: String,
    /// Bytes of memory: what allocations may reserve.
    pub memory: u64,
    /// Compute capability.
    pub sm: (i32, i32),
    /// Multiprocessors.
    pub multiprocessors: i32,
    /// Of the GPU.
    pub uuid: [u8; 16],
    /// Of the MIG instance, where this is one.
    pub mig_uuid: Option<[u8; 16]>,
    /// Whether stream-ordered memory pools are supported.
    pub pools: bool,
    /// Which GPU of the description this is (or is a part of).
    pub gpu: usize,
    /// GPUs whose memory it can reach.
    pub peers: Vec<usize>,
}

/// The whole machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// As `cuDriverGetVersion` gives it: 1000 x major + 10 x minor.
    pub driver_version: i32,
    /// What `cuInit` answers instead of success.
    pub init_error: Option<u32>,
    /// In the order of their ordinals.
    pub devices: Vec<DeviceDescription>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    driver_version: Option<i32>,
    driver: Option<String>,
    init_error: Option<u32>,
    #[serde(default)]
    gpu: Vec<Gpu>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Gpu {
    name: Option<String>,
    memory: Option<String>,
    sm: Option<String>,
    multiprocessors: Option<i32>,
    uuid: Option<String>,
    pools: Option<bool>,
    peers: Option<Vec<usize>>,
    #[serde(default)]
    mig: Vec<Mig>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Mig {
    profile: String,
    memory: String,
    uuid: Option<String>,
    multiprocessors: Option<i32>,
}

impl Machine {
    /// From `SOFTCUDA_DEVICES` (inline where it has a `=`, else a file's path) and `CUDA_VISIBLE_DEVICES`.
    pub fn from_settings() -> Result<Self, DescriptionError> {
        let text = settings::get("SOFTCUDA_DEVICES").unwrap_or_default();
        let machine = if text.contains('=') || text.is_empty() {
            inline(&text)?
        } else {
            let content = std::fs::read_to_string(&text)
                .map_err(|error| DescriptionError(format!("SOFTCUDA_DEVICES: file '{text}': {error}")))?;
            file(&content, text.ends_with(".json"))
                .map_err(|error| DescriptionError(format!("SOFTCUDA_DEVICES: file '{text}': {error}")))?
        };
        build(machine, settings::get("CUDA_VISIBLE_DEVICES").as_deref())
    }

    /// From the inline form alone, as in `gpus=2,memory=1GiB`.
    pub fn from_inline(text: &str) -> Result<Self, DescriptionError> {
        build(inline(text)?, None)
    }

    /// From a file's content alone, TOML or JSON.
    pub fn from_file(content: &str, json: bool) -> Result<Self, DescriptionError> {
        build(file(content, json)?, None)
    }
}

fn file(content: &str, json: bool) -> Result<File, DescriptionError> {
    if json {
        serde_json::from_str(content).map_err(|error| DescriptionError(error.to_string()))
    } else {
        toml::from_str(content).map_err(|error| DescriptionError(error.to_string()))
    }
}

fn inline(text: &str) -> Result<File, DescriptionError> {
    let mut gpu = Gpu::default();
    let (mut gpus, mut migs, mut own) = (1_usize, 0_usize, false);
    let mut machine = File { driver_version: None, driver: None, init_error: None, gpu: Vec::new() };
    for pair in text.split(',').map(str::trim).filter(|pair| !pair.is_empty()) {
        let Some((key, value)) = pair.split_once('=') else {
            return refuse(format!("SOFTCUDA_DEVICES: '{pair}' is not KEY=VALUE"));
        };
        let (key, value) = (key.trim(), value.trim());
        let number = |what: &str| {
            value
                .parse::<usize>()
                .map_err(|_| DescriptionError(format!("SOFTCUDA_DEVICES: {what}={value} is not a number")))
        };
        match key {
            "gpus" => gpus = number("gpus")?,
            "memory" => gpu.memory = Some(value.to_owned()),
            "name" => gpu.name = Some(value.to_owned()),
            "sm" => gpu.sm = Some(value.to_owned()),
            "multiprocessors" => gpu.multiprocessors = i32::try_from(number("multiprocessors")?).ok(),
            "pools" => gpu.pools = Some(number("pools")? != 0),
            "peers" if value == "none" => gpu.peers = Some(Vec::new()),
            "peers" if value == "all" => gpu.peers = None,
            "mig" => migs = number("mig")?,
            "uuids" if value == "process" => own = true,
            "driver" if value.parse::<i32>().is_ok() => machine.driver_version = value.parse().ok(),
            "driver" => machine.driver = Some(value.to_owned()),
            "init_error" => machine.init_error = u32::try_from(number("init_error")?).ok(),
            _ => {
                return refuse(format!(
                    "SOFTCUDA_DEVICES: '{pair}' is not known; use gpus, memory, name, sm, multiprocessors, pools=0|1, \
                     peers=all|none, mig, uuids=process, driver=VERSION|missing, init_error, or name a TOML or JSON file"
                ));
            }
        }
    }
    if migs > 0 {
        let memory = size(gpu.memory.as_deref(), MEMORY_DEFAULT)? / migs as u64;
        gpu.mig = vec![
            Mig {
                profile: "1g".to_owned(),
                memory: memory.to_string(),
                uuid: None,
                multiprocessors: None
            };
            migs
        ];
    }
    if gpus > DEVICES_MAX {
        return refuse(format!("SOFTCUDA_DEVICES: {gpus} GPUs are more than {DEVICES_MAX}"));
    }
    machine.gpu = vec![gpu; gpus];
    if own {
        for (index, gpu) in machine.gpu.iter_mut().enumerate() {
            let uuid = |instance: usize| {
                format!("{:08x}-0000-4000-80{instance:02x}-{index:012x}", std::process::id())
            };
            gpu.uuid = Some(uuid(0));
            for (number, mig) in gpu.mig.iter_mut().enumerate() {
                mig.uuid = Some(uuid(number + 1));
            }
        }
    }
    Ok(machine)
}

fn build(file: File, visible: Option<&str>) -> Result<Machine, DescriptionError> {
    let init_error = match file.driver.as_deref() {
        None => file.init_error,
        Some("missing") => Some(STUB_LIBRARY),
        Some(other) => return refuse(format!("driver = '{other}': only \"missing\" is known")),
    };
    let count = file.gpu.len();
    let (mut whole, mut instances) = (Vec::new(), Vec::new());
    for (index, gpu) in file.gpu.iter().enumerate() {
        let base = device(index, gpu, count)?;
        if gpu.mig.is_empty() {
            whole.push(base);
            continue;
        }
        for (number, mig) in gpu.mig.iter().enumerate() {
            let uuid = mig.uuid.as_deref().map(uuid).transpose()?;
            instances.push(DeviceDescription {
                name: format!("{} MIG {}", base.name, mig.profile),
                memory: size(Some(&mig.memory), 0)?,
                multiprocessors: mig.multiprocessors.unwrap_or(base.multiprocessors / 7),
                mig_uuid: Some(uuid.unwrap_or_else(|| derived(index, number + 1))),
                peers: Vec::new(),
                ..base.clone()
            });
        }
    }
    let devices = select(whole, instances, visible);
    if devices.len() > DEVICES_MAX {
        return refuse(format!("{} devices are more than {DEVICES_MAX}", devices.len()));
    }
    Ok(Machine { driver_version: file.driver_version.unwrap_or(DRIVER_DEFAULT), init_error, devices })
}

/// What `CUDA_VISIBLE_DEVICES` leaves: like the driver, it stops at the first entry that names nothing, and
/// without it one MIG instance at most is seen, and only where there is no whole GPU.
fn select(
    whole: Vec<DeviceDescription>,
    mut instances: Vec<DeviceDescription>,
    visible: Option<&str>,
) -> Vec<DeviceDescription> {
    let Some(visible) = visible else {
        if whole.is_empty() {
            instances.truncate(1);
            return instances;
        }
        return whole;
    };
    let mut devices: Vec<DeviceDescription> = Vec::new();
    for entry in visible.split(',').map(str::trim) {
        let found = if let Ok(index) = entry.parse::<usize>() {
            whole.get(index)
        } else if let Some(text) = entry.strip_prefix("MIG-") {
            uuid(text).ok().and_then(|uuid| instances.iter().find(|device| device.mig_uuid == Some(uuid)))
        } else {
            let text = entry.strip_prefix("GPU-").unwrap_or(entry);
            uuid(text).ok().and_then(|uuid| whole.iter().find(|device| device.uuid == uuid))
        };
        match found {
            Some(device) if !devices.contains(device) => devices.push(device.clone()),
            _ => break,
        }
    }
    devices
}

fn device(index: usize, gpu: &Gpu, count: usize) -> Result<DeviceDescription, DescriptionError> {
    let sm = gpu.sm.as_deref().unwrap_or("9.0");
    let capability = sm
        .split_once('.')
        .and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)))
        .ok_or_else(|| DescriptionError(format!("sm = '{sm}' is not MAJOR.MINOR, as in 9.0")))?;
    let memory = size(gpu.memory.as_deref(), MEMORY_DEFAULT)?;
    let peers = gpu.peers.clone().unwrap_or_else(|| (0..count).filter(|other| *other != index).collect());
    Ok(DeviceDescription {
        name: gpu.name.clone().unwrap_or_else(|| "softcuda".to_owned()),
        memory,
        sm: capability,
        multiprocessors: gpu.multiprocessors.unwrap_or(132),
        uuid: gpu.uuid.as_deref().map(uuid).transpose()?.unwrap_or_else(|| derived(index, 0)),
        mig_uuid: None,
        pools: gpu.pools.unwrap_or(true),
        gpu: index,
        peers,
    })
}

/// A UUID that is the same in each process for the same place in the description.
fn derived(gpu: usize, instance: usize) -> [u8; 16] {
    let mut bytes = *b"softcuda-gpu\0\0\0\0";
    bytes[12] = u8::try_from(instance).unwrap_or(u8::MAX);
    bytes[15] = u8::try_from(gpu).unwrap_or(u8::MAX);
    bytes
}

fn uuid(text: &str) -> Result<[u8; 16], DescriptionError> {
    let text = text.strip_prefix("GPU-").or_else(|| text.strip_prefix("MIG-")).unwrap_or(text);
    let digits: Vec<u32> = text.chars().filter(|c| *c != '-').map_while(|c| c.to_digit(16)).collect();
    if digits.len() != 32 || text.chars().any(|c| c != '-' && !c.is_ascii_hexdigit()) {
        return refuse(format!("uuid '{text}' does not have 32 hexadecimal digits"));
    }
    let mut bytes = [0; 16];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks(2)) {
        *byte = u8::try_from(pair[0] * 16 + pair[1]).unwrap_or_default();
    }
    Ok(bytes)
}

fn size(text: Option<&str>, default: u64) -> Result<u64, DescriptionError> {
    let Some(text) = text else { return Ok(default) };
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let factor = match text[digits.len()..].trim() {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => 0,
    };
    match digits.parse::<u64>().ok().and_then(|number| number.checked_mul(factor)) {
        Some(bytes @ 1..=MEMORY_MAX) => Ok(bytes),
        _ => refuse(format!("memory '{text}' is not a size from 1 byte to 1024 GiB, as in 512MiB or 2GiB")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inline_descriptions_make_equal_gpus() {
        let machine = Machine::from_inline("gpus=2,memory=512MiB,sm=8.6,pools=0,driver=11040").unwrap();
        assert_eq!((machine.devices.len(), machine.driver_version), (2, 11_040));
        assert_eq!((machine.devices[1].memory, machine.devices[1].sm), (512 << 20, (8, 6)));
        assert!(!machine.devices[0].pools && machine.devices[0].uuid != machine.devices[1].uuid);
        assert_eq!(machine.devices[0].peers, [1]);
        assert_eq!(Machine::from_inline("driver=missing").unwrap().init_error, Some(34));
    }

    #[test]
    fn files_describe_each_gpu() {
        let text = "driver_version = 12040\n[[gpu]]\nname = \"A\"\nmemory = \"1GiB\"\npeers = []\n\
                    uuid = \"GPU-00112233-4455-6677-8899-aabbccddeeff\"\n[[gpu]]\n\
                    mig = [{ profile = \"1g.10gb\", memory = \"64MiB\" }, { profile = \"2g.20gb\", memory = \"128MiB\" }]\n";
        let machine = Machine::from_file(text, false).unwrap();
        assert_eq!(machine.devices.len(), 1, "MIG instances hide behind whole GPUs");
        assert_eq!(machine.devices[0].uuid[..3], [0, 0x11, 0x22]);
        let mig =
            Machine::from_file("{\"gpu\":[{\"mig\":[{\"profile\":\"1g\",\"memory\":\"1MiB\"}]}]}", true)
                .unwrap();
        assert_eq!(mig.devices[0].name, "softcuda MIG 1g");
        let all =
            build(file(text, false).unwrap(), Some("MIG-736f6674-6375-6461-2d67-707502000001,0")).unwrap();
        assert_eq!(all.devices[0].memory, 128 << 20);
        assert_eq!(all.devices[1].name, "A");
        assert!(build(file(text, false).unwrap(), Some("MIG-0")).unwrap().devices.is_empty());
    }

    #[test]
    fn nonsense_is_refused_with_its_place() {
        for (text, word) in [
            ("gpus", "KEY=VALUE"),
            ("gpus=x", "not a number"),
            ("gpus=100", "more than 64"),
            ("memory=0", "not a size"),
            ("memory=3TiB", "not a size"),
            ("sm=9", "MAJOR.MINOR"),
            ("colour=red", "not known"),
            ("driver=old", "only \"missing\""),
        ] {
            let error = Machine::from_inline(text).unwrap_err().to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
        assert!(Machine::from_file("[[gpu]]\nnane = 1\n", false).is_err());
        assert!(Machine::from_file("[[gpu]]\nuuid = \"12\"\n", false).is_err());
    }
}
