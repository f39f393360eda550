//! GPUs that cannot be used, as an operator meets them: the server on softcuda as the machine's driver says which key asks
//! for what is not there, and ends with the code for a wrong configuration.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

/// Bad configuration, as the API's table of exit codes has it.
const BAD_CONFIGURATION: i32 = 78;

/// The binary on a machine that softcuda plays.
fn keepwarm(folder: &Path, machine: &str) -> Command {
    let built = softcuda::layout::beside_this_program().expect("softcuda is built with the tests");
    softcuda::layout::lay_out(&built, folder).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_keepwarm"));
    command.env("LD_LIBRARY_PATH", folder).env("SOFTCUDA_DEVICES", machine);
    command
}

fn serve(command: &mut Command, gpus: &[&str]) -> Output {
    command.args(["serve", "--ephemeral", "--http", "127.0.0.1:0", "--pinned", "16MiB"]);
    for gpu in gpus {
        command.args(["--gpu", gpu]);
    }
    command.output().unwrap()
}

fn refused(machine: &str, gpu: &str, told: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let output = serve(&mut keepwarm(folder.path(), machine), &[gpu]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(BAD_CONFIGURATION), "{machine}, {gpu}: {said}");
    for part in told {
        assert!(said.contains(part), "{machine}, {gpu} lacks '{part}': {said}");
    }
}

#[test]
fn what_the_driver_does_not_have_names_the_key() {
    let one = "gpus=1,memory=64MiB,uuids=process";
    refused(one, "cuda:9=16MiB", &["gpu[0].device = \"cuda:9\"", "there is no cuda:9", "cuda:0 (softcuda"]);
    refused(one, "cuda:0=1GiB", &["gpu[0].memory = \"1GiB\"", "64MiB", "ask for less"]);
    let gone = "MIG-00112233-4455-6677-8899-aabbccddeeff";
    refused(
        one,
        &format!("{gone}=16MiB"),
        &[&format!("gpu[0].device = \"{gone}\""), "there is no MIG-", "cuda:0"],
    );
    refused("gpus=1,pools=0", "cuda:0=16MiB", &["gpu[0].device = \"cuda:0\"", "memory pools"]);
    refused("driver=11080", "cuda:0=16MiB", &["gpu[0].device = \"cuda:0\"", "CUDA 11.8", "525"]);
    refused("driver=missing", "cuda:0=16MiB", &["gpu[0].device = \"cuda:0\"", "CUDA_ERROR_STUB_LIBRARY"]);
}

#[test]
fn a_machine_without_a_driver_is_told_apart() {
    if has_driver() {
        println!("skipped: this machine has a driver");
        return;
    }
    let output = serve(&mut Command::new(env!("CARGO_BIN_EXE_keepwarm")), &["cuda:0=16MiB"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(BAD_CONFIGURATION), "{said}");
    assert!(said.contains("gpu[0].device = \"cuda:0\": no CUDA driver was found"), "{said}");
}

/// Whether the loader finds NVIDIA's driver.
fn has_driver() -> bool {
    Path::new("/proc/driver/nvidia/version").exists()
}

#[test]
fn a_second_node_on_a_gpu_is_refused_and_the_first_serves() {
    let folder = tempfile::tempdir().unwrap();
    // Both must see one machine: its UUID is this test's own.
    let machine = folder.path().join("machine.toml");
    let uuid = uuid::Uuid::now_v7();
    std::fs::write(&machine, format!("[[gpu]]\nmemory = \"64MiB\"\nuuid = \"{uuid}\"\n")).unwrap();
    let machine = machine.display().to_string();
    let (mut first, line) = started(&mut keepwarm(folder.path(), &machine));
    let second = serve(&mut keepwarm(folder.path(), &machine), &["cuda:0=16MiB"]);
    let alive = first.try_wait().unwrap().is_none();
    first.kill().unwrap();
    first.wait().unwrap();
    assert!(line.starts_with("ready http=") && alive, "{line}");
    let said = String::from_utf8_lossy(&second.stderr);
    assert_eq!(second.status.code(), Some(BAD_CONFIGURATION), "{said}");
    assert!(said.contains("gpu[0].device = \"cuda:0\"") && said.contains("is in use already"), "{said}");
    let (mut third, line) = started(&mut keepwarm(folder.path(), &machine));
    third.kill().unwrap();
    third.wait().unwrap();
    assert!(line.starts_with("ready http="), "the claim ends with its process: {line}");
}

fn probe(folder: &Path, machine: &str, more: &[&str]) -> (Option<i32>, serde_json::Value) {
    let output = keepwarm(folder, machine).args(["gpu", "probe", "--json"]).args(more).output().unwrap();
    (output.status.code(), serde_json::from_slice(&output.stdout).unwrap_or_default())
}

#[test]
fn probe_shows_what_there_is_what_a_node_takes_and_who_has_a_gpu() {
    let folder = tempfile::tempdir().unwrap();
    let machine = folder.path().join("machine.toml");
    let uuids = [(); 2].map(|()| uuid::Uuid::now_v7());
    let gpu = |uuid| format!("[[gpu]]\nname = \"Big\"\nmemory = \"64MiB\"\nuuid = \"{uuid}\"\n");
    std::fs::write(&machine, uuids.map(gpu).concat()).unwrap();
    let machine = machine.display().to_string();
    let (mut holder, _) = started(&mut keepwarm(folder.path(), &machine));
    let (code, found) = probe(folder.path(), &machine, &[]);
    holder.kill().unwrap();
    holder.wait().unwrap();
    assert_eq!((code, found["driver_version"].as_u64()), (Some(0), Some(12_080)), "{found}");
    let [first, second] = [0, 1].map(|index| found["devices"][index].clone());
    assert_eq!((&first["name"], &first["uuid"]), (&"Big".into(), &uuids[0].to_string().into()));
    assert!(first["reason"].as_str().unwrap().contains("is in use already"), "{first}");
    assert_eq!((&second["usable"], second["memory_bytes"].as_u64()), (&true.into(), Some(64 << 20)));

    let config = folder.path().join("cluster.toml");
    let text = |memory: &str| {
        format!(
            "version = 1\n[cluster]\nname = \"x\"\nreplication = 1\nshards = 64\n[[node]]\nname = \"n1\"\nhttp = \
             \"127.0.0.1:7000\"\npinned = \"16MiB\"\n[[node.gpu]]\ndevice = \"cuda:0\"\nmemory = \"16MiB\"\n\
             [[node.gpu]]\ndevice = \"cuda:1\"\nmemory = \"{memory}\"\n"
        )
    };
    for (memory, code, fits) in [("32MiB", 0, true), ("1GiB", BAD_CONFIGURATION, false)] {
        std::fs::write(&config, text(memory)).unwrap();
        let (ended, found) =
            probe(folder.path(), &machine, &["--config", &config.display().to_string(), "--node", "n1"]);
        assert_eq!((ended, &found["reserved"][1]["fits"]), (Some(code), &fits.into()), "{found}");
        let keys: Vec<_> = found["reserved"].as_array().unwrap().iter().map(|one| &one["key"]).collect();
        assert_eq!(keys, ["gpu[0].memory", "gpu[1].memory", "pinned"]);
    }
    let limited = keepwarm(folder.path(), &machine)
        .env("CUDA_MPS_PINNED_DEVICE_MEM_LIMIT", "0=8M")
        .args(["gpu", "probe", "--json", "--node", "n1", "--config", &config.display().to_string()])
        .output()
        .unwrap();
    let found: serde_json::Value = serde_json::from_slice(&limited.stdout).unwrap();
    let limits = [0, 1].map(|index| found["devices"][index]["limit_bytes"].as_u64());
    assert_eq!(limits, [Some(8 << 20), Some(64 << 20)], "{found}");
    assert_eq!(found["reserved"][0]["fits"], false);
    let why = found["reserved"][0]["why"].as_str().unwrap();
    assert!(why.contains("CUDA_MPS_PINNED_DEVICE_MEM_LIMIT allows 8MiB"), "{why}");
    let (code, found) = probe(folder.path(), "driver=11080", &[]);
    assert!(code == Some(0) && found["driver"].as_str().unwrap().contains("CUDA 11.8"), "{found}");
}

/// A server and the first line that it prints.
fn started(command: &mut Command) -> (Child, String) {
    let mut child = command
        .args(["serve", "--ephemeral", "--http", "127.0.0.1:0", "--pinned", "16MiB", "--gpu", "cuda:0=16MiB"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    (child, line)
}
