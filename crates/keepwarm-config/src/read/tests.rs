use proptest::prelude::{any, prop, proptest};

use crate::{Config, DeviceSpec};

const WHOLE: &str = r#"version = 3
[cluster]
name = "prod"
replication = 1
shards = 1024
degraded_writes = "refuse"
sync = "interval"
[[node]]
name = "n1"
http = "127.0.0.1:7000"
pinned = "200GiB"
data_dir = "data"
[[node.gpu]]
device = "cuda:0"
memory = "60GiB"
[[tenant]]
name = "acme"
token_sha256 = "0f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c4b5a69788796a5b4c3d2e1f0"
share = 0.5
[[model]]
name = "smol"
engine = "builtin"
source = "gguf:models/smol.gguf"
instances = { min = 1, max = 2 }
batch = { max = 8, delay_us = 2000 }
[tiers]
hbm = { low = 0.7, high = 0.9 }
"#;

fn errors(text: &str) -> String {
    Config::parse("cluster.toml", text).expect_err("the text is wrong").to_string()
}

#[test]
fn a_whole_file_reads_into_types() {
    let config = Config::parse("cluster.toml", WHOLE).unwrap();
    assert_eq!((config.version, config.nodes.len(), config.shards.get()), (3, 1, 1024));
    assert_eq!(config.nodes[0].gpus[0].device.to_string(), "cuda:0");
    assert_eq!(config.tenants[0].token_sha256[1], 0x1e);
    assert_eq!(config.models[0].instances, (1, 2));
    assert_eq!((config.hbm.high, config.pinned.high), (0.9, 0.92));
}

#[test]
fn a_gpu_is_a_nodes_once() {
    let text = WHOLE.replace(
        "[[tenant]]",
        "[[node.gpu]]\ndevice = \"host\"\nmemory = \"1GiB\"\n[[node.gpu]]\ndevice = \"cuda:0\"\nmemory = \"1GiB\"\n[[tenant]]",
    );
    assert_eq!(
        errors(&text),
        "cluster.toml:20:10: node[0].gpu[2].device: cuda:0 is gpu[0] of this node already"
    );
}

#[test]
fn the_shipped_example_is_valid() {
    let text = include_str!("../../../../cluster.toml");
    Config::parse("cluster.toml", text).unwrap();
}

#[test]
fn a_misspelt_key_names_the_nearest() {
    let text = WHOLE.replace("replication", "replicaton");
    assert_eq!(
        errors(&text),
        "cluster.toml:4:1: cluster.replicaton: unknown key; did you mean 'replication'?"
    );
    let text = WHOLE.replace("\"refuse\"", "\"refused\"");
    assert!(
        errors(&text)
            .contains("cluster.degraded_writes: 'refused' is none of allow, refuse; did you mean 'refuse'?")
    );
}

#[test]
fn every_error_is_reported_with_its_place() {
    let text = WHOLE
        .replace("200GiB", "200GB")
        .replace("cuda:0", "gpu0")
        .replace("shards = 1024", "shards = 1000")
        .replace("low = 0.7", "low = 0.95")
        .replace("0f1e2d3c4b5a", "");
    let errors = errors(&text);
    for expected in [
        "cluster.toml:5:10: cluster.shards: 1000 shards: must be a power of two from 1 to 65536",
        "cluster.toml:11:10: node[0].pinned: unknown unit 'GB' in '200GB': use B, KiB, MiB, GiB or TiB",
        "cluster.toml:14:10: node[0].gpu[0].device: 'gpu0' is not a device: use host, cuda:N or a MIG UUID (MIG-...)",
        "tenant[0].token_sha256: must have 64 hexadecimal digits",
        "tiers.hbm.low: 0.95 must be less than high = 0.9",
    ] {
        assert!(errors.contains(expected), "missing: {expected}\nin: {errors}");
    }
    assert_eq!(errors.lines().count(), 5);
}

#[test]
fn missing_and_contradicting_parts_are_errors() {
    assert!(errors("").contains("version: is missing") && errors("").contains("node: is missing"));
    assert!(
        errors(&WHOLE.replace("replication = 1", "replication = 2")).contains("2 copies need as many nodes")
    );
    assert!(errors(&WHOLE.replace("version = 3", "version = -1")).contains("version: -1 is out of range"));
    assert!(errors("version = ").starts_with("cluster.toml:1:"));
    let open = WHOLE.replace("127.0.0.1:7000", "0.0.0.0:7000");
    Config::parse("cluster.toml", &open).unwrap();
    let tenant = open.find("[[tenant]]").unwrap()..open.find("[[model]]").unwrap();
    let open = open.replace(&open[tenant], "");
    assert!(errors(&open).contains("node[0].http: '0.0.0.0:7000' is not a loopback address"));
}

#[test]
fn gpus_on_the_command_line_need_a_size() {
    assert_eq!("host=256MiB".parse::<DeviceSpec>().unwrap().0.memory.0, 256 << 20);
    for wrong in ["host", "host=", "=1GiB", "cuda:x=1GiB", "MIG-=1GiB"] {
        assert!(wrong.parse::<DeviceSpec>().is_err(), "{wrong}");
    }
}

proptest! {
    #[test]
    fn no_text_panics(cut in 0..WHOLE.len(), junk in prop::collection::vec(any::<char>(), 0..12), keep in any::<bool>()) {
        let junk: String = junk.into_iter().collect();
        let rest = if keep { &WHOLE[cut..] } else { "" };
        drop(Config::parse("cluster.toml", &format!("{}{junk}{rest}", &WHOLE[..cut])));
    }
}
