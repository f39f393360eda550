use std::fs;
use std::path::Path;
use std::time::Duration;

use keepwarm_types::Bytes;

use crate::Config;

const THREE: &str = r#"version = 1
[cluster]
name = "c"
replication = 2
shards = 64
[tls]
ca = "certs/ca.pem"
dir = "certs"
[[node]]
name = "n1"
http = "127.0.0.1:7001"
peer = "127.0.0.1:7101"
pinned = "64MiB"
data_dir = "data/n1"
voter = true
[[node]]
name = "n2"
http = "127.0.0.1:7002"
peer = "127.0.0.1:7102"
pinned = "64MiB"
data_dir = "/data/n2"
voter = true
[[node]]
name = "n3"
http = "127.0.0.1:7003"
peer = "127.0.0.1:7103"
pinned = "0B"
data_dir = "data/n3"
voter = true
[[model]]
name = "m"
source = "gguf:models/m.gguf"
"#;

/// The file with one change, which must apply.
fn changed(from: &str, to: &str) -> String {
    assert!(THREE.contains(from), "'{from}' is not in the file");
    THREE.replacen(from, to, 1)
}

fn errors(text: &str) -> String {
    Config::parse("cluster.toml", text).expect_err("the text is wrong").to_string()
}

/// The file without its last node.
fn two() -> String {
    let third = THREE.find("[[node]]\nname = \"n3\"").unwrap()..THREE.find("[[model]]").unwrap();
    THREE.replacen(&THREE[third], "", 1).replacen("voter = true\n", "", 1)
}

#[track_caller]
fn refused(from: &str, to: &str, expected: &str) {
    let errors = errors(&changed(from, to));
    assert_eq!(errors.lines().count(), 1, "one mistake is one error: {errors}");
    assert!(errors.starts_with(expected), "expected: {expected}\nis: {errors}");
}

#[test]
fn a_third_node_may_only_vote() {
    let config = Config::parse("cluster.toml", THREE).unwrap();
    let names = |nodes: Vec<&crate::NodeConfig>| -> Vec<String> {
        nodes.iter().map(|node| node.name.to_string()).collect()
    };
    assert!(config.is_cluster());
    assert_eq!(names(config.voters().collect()), ["n1", "n2", "n3"]);
    assert_eq!(names(config.storing().collect()), ["n1", "n2"]);
    assert_eq!(config.nodes[2].pinned, Bytes::ZERO);
    assert_eq!(config.warnings(), [""; 0]);
}

#[test]
fn a_node_that_stores_needs_pinned_memory() {
    let expected =
        "cluster.toml:27:10: node[2].pinned: 0B is too small: at least 1MiB, except on a node that only";
    refused(
        "pinned = \"0B\"\ndata_dir = \"data/n3\"\nvoter = true",
        "pinned = \"0B\"\ndata_dir = \"data/n3\"",
        expected,
    );
    let gpu = "[[node.gpu]]\ndevice = \"host\"\nmemory = \"1MiB\"\n[[model]]";
    refused("[[model]]", gpu, expected);
    refused("\"0B\"", "\"5B\"", "cluster.toml:27:10: node[2].pinned: 5B is too small: at least 1MiB");
    let none = THREE.replace("64MiB", "0B");
    assert!(errors(&none).contains("node: all nodes only vote and none stores"), "{}", errors(&none));
}

#[test]
fn each_of_several_nodes_needs_a_peer_address_that_others_can_find() {
    let line = "peer = \"127.0.0.1:7102\"\n";
    refused(line, "", "cluster.toml:16:1: node[1].peer: is missing: with several nodes");
    refused("7102\"", "0\"", "cluster.toml:19:8: node[1].peer: '127.0.0.1:0' has port 0");
    refused("127.0.0.1:7102", "nowhere", "cluster.toml:19:8: node[1].peer: 'nowhere' is not HOST:PORT");
}

#[test]
fn names_and_addresses_are_unique() {
    refused("\"n3\"", "\"n1\"", "cluster.toml:24:8: node[2].name: 'n1' is already node[0].name");
    refused(":7002", ":7001", "cluster.toml:18:8: node[1].http: '127.0.0.1:7001' is already node[0].http");
    refused(":7103", ":7102", "cluster.toml:26:8: node[2].peer: '127.0.0.1:7102' is already node[1].peer");
    refused(
        "[[model]]",
        "[[model]]\nname = \"m\"\nsource = \"tiny:1\"\n[[model]]",
        "cluster.toml:34:8: model[1].name",
    );
    let case = THREE.replace("127.0.0.1:7001", "LocalHost:7001").replace("127.0.0.1:7002", "localhost:7001");
    assert!(errors(&case).contains("node[1].http: 'localhost:7001' is already node[0].http"));
    // TCP and UDP have ports of their own, and port 0 is another one each time.
    Config::parse("cluster.toml", &changed(":7101", ":7001")).unwrap();
    let free = THREE.replace(":7001", ":0").replace(":7002", ":0");
    Config::parse("cluster.toml", &free).unwrap();
}

#[test]
fn peers_beyond_loopback_need_certificates() {
    let tls = "[tls]\nca = \"certs/ca.pem\"\ndir = \"certs\"\n";
    let open = changed("127.0.0.1:7102", "10.0.0.2:7102");
    Config::parse("cluster.toml", &open).unwrap();
    let errors = errors(&open.replace(tls, ""));
    assert!(
        errors.starts_with("cluster.toml:16:8: node[1].peer: '10.0.0.2:7102' is not a loopback address"),
        "{errors}"
    );
    assert!(errors.contains("keepwarm cert ca") && errors.contains("[tls]") && errors.lines().count() == 1);
    Config::parse("cluster.toml", &changed(tls, "")).unwrap();
    let names = THREE.replace("127.0.0.1:7101", "localhost:7101").replace(tls, "");
    Config::parse("cluster.toml", &names).unwrap();
}

#[test]
fn an_odd_number_of_at_most_five_nodes_votes() {
    let none = THREE.replace("voter = true", "voter = false").replace("\"0B\"", "\"1MiB\"");
    assert!(
        errors(&none).starts_with("cluster.toml:9:1: node: none of the 3 nodes votes"),
        "{}",
        errors(&none)
    );
    refused(
        "data_dir = \"data/n1\"\nvoter = true",
        "data_dir = \"data/n1\"",
        "cluster.toml:28:9: node[2].voter: 2 nodes vote: an even number survives no more failures than 1",
    );
    let more = |count: usize| -> String {
        let node = |n: usize| {
            format!(
                "[[node]]\nname = \"m{n}\"\nhttp = \"127.0.0.1:80{n}\"\npeer = \"127.0.0.1:81{n}\"\n\
                 pinned = \"0B\"\nvoter = true\n"
            )
        };
        format!("{THREE}{}", (0..count).map(node).collect::<String>())
    };
    Config::parse("cluster.toml", &more(2)).unwrap();
    let seven = errors(&more(4));
    assert!(seven.contains("node[6].voter: 7 nodes vote, at most 5 may: set voter = false on 2"), "{seven}");
    let one = changed("\"data/n1\"\nvoter = true", "\"data/n1\"").replacen("voter = true", "", 1);
    let config = Config::parse("cluster.toml", &one).unwrap();
    assert!(config.warnings()[0].starts_with("n3 is the only voter"), "{:?}", config.warnings());
}

#[test]
fn a_lone_node_votes_unasked_and_needs_no_peer() {
    let from = THREE.find("[[node]]\nname = \"n2\"").unwrap();
    let lone = THREE[..from].replace("replication = 2", "").replace("voter = true", "");
    let config = Config::parse("cluster.toml", &lone.replace("peer = \"127.0.0.1:7101\"", "")).unwrap();
    assert!(config.nodes[0].voter && !config.is_cluster() && config.warnings().is_empty());
}

#[test]
fn copies_need_nodes_that_store() {
    refused(
        "replication = 2",
        "replication = 3",
        "cluster.toml:4:15: cluster.replication: 3 copies need as many nodes that store; the file has 2",
    );
}

#[test]
fn a_node_cannot_take_the_name_of_the_authoritys_certificate() {
    refused("\"n2\"", "\"ca\"", "cluster.toml:17:8: node[1].name: 'ca' cannot be a node's name here");
    Config::parse("cluster.toml", &changed("\"n2\"", "\"ca\"").replace("certs/ca.pem", "ca.pem")).unwrap();
}

#[test]
fn deadlines_have_defaults_and_limits() {
    let config = Config::parse("cluster.toml", THREE).unwrap();
    assert_eq!(config.suspect_after, Duration::from_millis(400));
    assert_eq!((config.give_up_after, config.write_deadline), (None, Duration::from_secs(5)));
    let set =
        changed("shards = 64", "suspect_after_ms = 60000\ngive_up_after_s = 3600\nwrite_deadline_ms = 60000");
    let config = Config::parse("cluster.toml", &set).unwrap();
    assert_eq!(config.suspect_after, config.write_deadline);
    assert_eq!(config.give_up_after, Some(Duration::from_secs(3600)));
    assert!(config.warnings()[0].contains("write_deadline_ms = 60000 is not above"));
    for (wrong, reason) in [
        ("suspect_after_ms = 99", "cluster.suspect_after_ms: 99 is out of range: 100 to 60000"),
        ("suspect_after_ms = 60001", "60001 is out of range: 100 to 60000"),
        ("give_up_after_s = 0", "cluster.give_up_after_s: 0 is out of range: 1 to 2592000"),
        ("write_deadline_ms = 1", "cluster.write_deadline_ms: 1 is out of range: 100 to 600000"),
        ("suspect_after = 400", "unknown key; did you mean 'suspect_after_ms'?"),
    ] {
        let errors = errors(&changed("shards = 64", wrong));
        assert!(errors.contains(reason), "{errors}");
    }
}

#[test]
fn two_nodes_are_warned_that_neither_takes_over() {
    let config = Config::parse("cluster.toml", &two()).unwrap();
    let [warning] = &config.warnings()[..] else { panic!("{:?}", config.warnings()) };
    assert!(warning.contains("cannot take over") && warning.contains("pinned = \"0B\""), "{warning}");
}

#[test]
fn a_voter_without_a_disk_is_a_warning() {
    let config = Config::parse("cluster.toml", &changed("data_dir = \"data/n1\"\n", "")).unwrap();
    assert!(config.warnings()[0].starts_with("n1 votes without a data_dir"), "{:?}", config.warnings());
}

#[test]
fn several_mistakes_are_told_at_once_in_the_files_order() {
    let text = THREE
        .replace("127.0.0.1:7001", "10.0.0.1:7001")
        .replace("peer = \"127.0.0.1:7102\"\n", "")
        .replace("\"n3\"", "\"n1\"")
        .replace("shards = 64", "suspect_after_ms = 1");
    let errors = errors(&text);
    let keys: Vec<_> = errors.lines().map(|line| line.split(": ").nth(1).unwrap()).collect();
    assert_eq!(
        keys,
        ["cluster.suspect_after_ms", "node[0].http", "node[1].peer", "node[2].name"],
        "{errors}"
    );
}

#[test]
fn rules_that_count_wait_for_a_node_that_cannot_be_read() {
    let text = changed("\"n1\"", "\"-\"").replace("replication = 2", "replication = 3");
    assert_eq!(errors(&text).lines().count(), 1, "{}", errors(&text));
}

#[test]
fn relative_paths_start_at_the_files_folder() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cluster.toml");
    fs::write(&path, THREE).unwrap();
    let config = Config::load(&path).unwrap();
    let tls = config.tls.clone().unwrap();
    assert_eq!((tls.ca, tls.dir), (folder.path().join("certs/ca.pem"), folder.path().join("certs")));
    assert_eq!(config.nodes[0].data_dir, Some(folder.path().join("data/n1")));
    assert_eq!(config.nodes[1].data_dir.as_deref(), Some(Path::new("/data/n2")));
    assert_eq!(config.models[0].source, format!("gguf:{}", folder.path().join("models/m.gguf").display()));
    assert_eq!(config.path_of("bootstrap"), folder.path().join("bootstrap"));
    assert_eq!(config.path_of(config.path_of("x")), folder.path().join("x"), "twice is once");
    let here = Config::parse("cluster.toml", THREE).unwrap();
    assert_eq!(here.folder, std::env::current_dir().unwrap());
}
