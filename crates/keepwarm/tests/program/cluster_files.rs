//! The files of a cluster, made and checked by the binary: `init`, `check` and `cert`.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;
use std::net::{TcpListener, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU16, Ordering};

use serde_json::Value;

/// Below the ports that systems hand out by themselves, so that no other test gets one of them.
const PORTS: std::ops::Range<u16> = 12_000..30_000;
/// A cluster's ports lie this close together.
const STEP: usize = 200;
/// How far from another call's ports one begins to look.
const CALL: u16 = 4000;

fn keepwarm(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_keepwarm")).args(arguments).output().unwrap()
}

#[track_caller]
fn done(arguments: &[&str]) -> String {
    let output = keepwarm(arguments);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {errors}{}", String::from_utf8_lossy(&output.stdout));
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn json(arguments: &[&str]) -> Value {
    serde_json::from_str(&done(&[arguments, &["--json"]].concat())).unwrap()
}

/// What a command that ends with `code` says.
#[track_caller]
fn refused(code: i32, arguments: &[&str]) -> String {
    let output = keepwarm(arguments);
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
    assert!(!said.contains("panicked"), "{said}");
    said
}

/// Where a cluster of three finds its ports free; another place for each call.
fn port_base() -> u16 {
    static CALLS: AtomicU16 = AtomicU16::new(0);
    let from =
        PORTS.start + (std::process::id() % 50) as u16 * 4 + CALLS.fetch_add(1, Ordering::Relaxed) * CALL;
    let free = |base: &u16| {
        (1..=3).all(|node| {
            TcpListener::bind(("127.0.0.1", base + node)).is_ok()
                && UdpSocket::bind(("127.0.0.1", base + 100 + node)).is_ok()
        })
    };
    (from..PORTS.end).step_by(STEP).find(free).expect("some ports are free")
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

#[test]
fn what_init_writes_passes_check_on_every_node() {
    let folder = tempfile::tempdir().unwrap();
    let (dir, base) = (folder.path().join("a cluster"), port_base());
    let made = json(&[
        "init",
        "--nodes",
        "3",
        "--dir",
        &text(&dir),
        "--port-base",
        &base.to_string(),
        "--model",
        "tiny:1",
    ]);
    assert_eq!((&made["cluster"], made["warnings"].as_array().unwrap().len()), (&Value::from("local"), 0));
    assert!(!dir.join("data").exists(), "data folders are the nodes' to make");
    // The sizes are a demonstration's; this test may run where there is little memory.
    let path = dir.join("cluster.toml");
    let small = fs::read_to_string(&path).unwrap().replace("512MiB", "8MiB").replace("256MiB", "8MiB");
    fs::write(&path, small).unwrap();
    for (index, name) in ["n1", "n2", "n3"].into_iter().enumerate() {
        let node = &made["nodes"][index];
        assert_eq!(node["http"], format!("127.0.0.1:{}", usize::from(base) + 1 + index));
        assert_eq!(node["peer"], format!("127.0.0.1:{}", usize::from(base) + 101 + index));
        assert_eq!(node["command"][5], name);
        let report = json(&["check", node["command"][3].as_str().unwrap(), "--host", "--node", name]);
        let verdict = |subject: &str| {
            let found = report["host"].as_array().unwrap().iter().find(|found| found["subject"] == subject);
            found.unwrap_or_else(|| panic!("nothing on {subject}: {report}"))["verdict"].clone()
        };
        for subject in ["peer", "authority", &format!("certificate of {name}"), "bootstrap", "data_dir"] {
            assert_eq!(verdict(subject), "ok", "{report}");
        }
    }
    let bootstrap = fs::read_to_string(dir.join("bootstrap")).unwrap();
    assert!(bootstrap.contains(made["cluster_id"].as_str().unwrap()), "{bootstrap}");
    for key in ["ca.key", "n1.key", "n2.key", "n3.key"] {
        let mode = fs::metadata(dir.join("certs").join(key)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{key}");
    }
}

#[test]
fn init_says_what_to_do_next_and_what_cannot_be() {
    let folder = tempfile::tempdir().unwrap();
    let dir = text(&folder.path().join("c"));
    for (more, word) in [
        (["--nodes", "2", "--replication", "3"], "3 copies need as many nodes"),
        (["--nodes", "500", "--cluster", "c"], "1 to 100"),
        (["--port-base", "65500", "--cluster", "c"], "65535"),
        (["--nodes", "2", "--cluster", "a/b"], "'a/b'"),
    ] {
        let said = refused(2, &[&["init", "--dir", &dir][..], &more].concat());
        assert!(said.contains(word), "{said}");
    }
    assert!(refused(78, &["init", "--dir", &dir, "--model", "/no/such.gguf"]).contains("/no/such.gguf"));
    assert!(!Path::new(&dir).exists(), "a refusal leaves nothing behind");
    let said = done(&["init", "--nodes", "2", "--dir", &dir]);
    assert!(said.contains(&format!("keepwarm serve --config {dir}/cluster.toml --node n2")), "{said}");
    assert!(said.contains("warning: two nodes cannot take over"), "{said}");
    let file = format!("{dir}/cluster.toml");
    assert!(done(&["check", &file]).contains("warning: two nodes cannot take over"), "check says it too");
    let before = fs::read_to_string(&file).unwrap();
    assert!(refused(78, &["init", "--dir", &dir]).contains("cluster.toml exists"));
    assert_eq!(fs::read_to_string(&file).unwrap(), before);
}

#[test]
fn check_names_every_mistake_of_a_cluster_and_what_a_node_lacks() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("c");
    done(&["init", "--dir", &text(&dir), "--port-base", &port_base().to_string()]);
    let path = dir.join("cluster.toml");
    let good = fs::read_to_string(&path).unwrap().replace("512MiB", "8MiB").replace("256MiB", "8MiB");
    let wrong = good
        .replacen("voter = true ", "voter = false", 1)
        .replace("replication = 2", "replication = 4")
        .replace("name = \"n3\"", "name = \"n2\"");
    fs::write(&path, wrong).unwrap();
    let said = refused(78, &["check", &text(&path)]);
    for words in ["replication: 4 copies", "node[2].name: 'n2'", "node[2].voter: 2 nodes vote"] {
        assert!(said.contains(words) && said.matches("cluster.toml:").count() == 3, "{said}");
    }
    fs::write(&path, &good).unwrap();
    let check = ["check", &text(&path), "--host", "--node", "n2"];
    fs::remove_file(dir.join("certs/n2.key")).unwrap();
    assert!(refused(78, &check).contains("n2.key"));
    fs::copy(dir.join("certs/n1.key"), dir.join("certs/n2.key")).unwrap();
    assert!(refused(78, &check).contains("is not the key of the certificate"));
    fs::copy(dir.join("certs/n1.pem"), dir.join("certs/n2.pem")).unwrap();
    assert!(refused(78, &check).contains("is of n1 in cluster 'local', not of n2 in 'local'"));
    fs::write(dir.join("certs/n2.pem"), "nonsense").unwrap();
    assert!(refused(78, &check).contains("n2.pem: is no certificate"));
    fs::remove_file(dir.join("certs/n2.pem")).unwrap();
    assert!(refused(78, &check).contains("cannot read"));
    done(&["cert", "node", "n2", "--dir", &text(&dir.join("certs"))]);
    done(&check);
    fs::write(dir.join("bootstrap"), "cluster = \"other\"\n").unwrap();
    assert!(refused(78, &check).contains("bootstrap:1:1: id: is missing"));
}

#[test]
fn an_authority_is_replaced_while_both_are_trusted() {
    let folder = tempfile::tempdir().unwrap();
    let dir = text(folder.path());
    let trusted = || {
        let shown = json(&["cert", "show", "--dir", &dir]);
        let kinds = |kind: &str| {
            shown["certificates"].as_array().unwrap().iter().filter(|row| row["kind"] == kind).count()
        };
        (kinds("authority"), kinds("node"), shown["findings"].as_array().unwrap().len())
    };
    done(&["cert", "ca", "--dir", &dir, "--cluster", "prod"]);
    for node in ["n1", "n2"] {
        assert_eq!(json(&["cert", "node", node, "--dir", &dir])["replaced"], false);
    }
    assert_eq!(trusted(), (1, 2, 0));
    assert_eq!(json(&["cert", "ca", "--rotate", "--dir", &dir])["trusted"], 2);
    assert_eq!(trusted(), (2, 2, 2), "both nodes still have the older authority's");
    assert_eq!(json(&["cert", "node", "n1", "--dir", &dir])["replaced"], true);
    assert_eq!(trusted(), (2, 2, 1));
    let said = refused(78, &["cert", "ca", "--drop-old", "--dir", &dir]);
    assert!(said.contains("n2 still") && !said.contains("n1"), "{said}");
    assert_eq!(trusted().0, 2, "a refusal changes nothing");
    done(&["cert", "node", "n2", "--dir", &dir]);
    assert_eq!(json(&["cert", "ca", "--drop-old", "--dir", &dir])["dropped"], 1);
    assert_eq!(trusted(), (1, 2, 0));
    assert_eq!(json(&["cert", "ca", "--drop-old", "--dir", &dir])["dropped"], 0, "again is nothing");
    let names = fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(names, 6, "nothing but the certificates and their keys is left");
}

#[test]
fn a_rotation_cut_short_can_be_done_again() {
    let folder = tempfile::tempdir().unwrap();
    let dir = text(folder.path());
    done(&["cert", "ca", "--dir", &dir, "--cluster", "prod"]);
    done(&["cert", "node", "n1", "--dir", &dir]);
    let old = fs::read(folder.path().join("ca.key")).unwrap();
    done(&["cert", "ca", "--rotate", "--dir", &dir]);
    // As a crash between the two files leaves it: both are trusted, the old one issues.
    fs::write(folder.path().join("ca.key"), old).unwrap();
    done(&["cert", "node", "n2", "--dir", &dir]);
    assert_eq!(json(&["cert", "ca", "--rotate", "--dir", &dir])["trusted"], 3);
    for node in ["n1", "n2"] {
        done(&["cert", "node", node, "--dir", &dir]);
    }
    assert_eq!(json(&["cert", "ca", "--drop-old", "--dir", &dir])["dropped"], 2);
}

#[test]
fn certificates_that_end_soon_or_lie_open_are_warned_about() {
    let folder = tempfile::tempdir().unwrap();
    let dir = text(folder.path());
    done(&["cert", "ca", "--dir", &dir, "--cluster", "prod", "--days", "3650"]);
    done(&["cert", "node", "n1", "--dir", &dir, "--days", "29"]);
    done(&["cert", "node", "n2", "--dir", &dir]);
    let said = done(&["cert", "show", "--dir", &dir]);
    assert!(said.contains("warning: certificate of n1: ends on"), "{said}");
    assert!(said.contains("node n2") && !said.contains("certificate of n2"), "{said}");
    let key = folder.path().join("n2.key");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    assert!(done(&["cert", "show", "--dir", &dir]).contains("n2.key: others may read it: `chmod 600` it"));
}

#[test]
fn what_is_wrong_with_an_authority_is_said_with_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let dir = text(&folder.path().join("certs"));
    let node = ["cert", "node", "n1", "--dir", &dir];
    let none = refused(78, &node);
    assert!(none.contains("ca.pem") && none.contains("keepwarm cert ca"), "{none}");
    assert!(refused(2, &["cert", "ca", "--dir", &dir, "--cluster", "a/b"]).contains("'.'"));
    done(&["cert", "ca", "--dir", &dir, "--cluster", "prod"]);
    assert!(refused(78, &["cert", "ca", "--dir", &dir, "--cluster", "prod"]).contains("ca.pem exists"));
    let above = refused(78, &["cert", "node", "n1", "--dir", &text(folder.path())]);
    assert!(above.contains("did you mean --dir") && above.contains("certs"), "{above}");
    assert!(refused(2, &["cert", "node", "ca", "--dir", &dir]).contains("cannot be a node"));
    let other = refused(78, &["cert", "ca", "--rotate", "--cluster", "test", "--dir", &dir]);
    assert!(other.contains("cluster 'prod', not of 'test'"), "{other}");
    let stranger = text(&folder.path().join("stranger"));
    done(&["cert", "ca", "--dir", &stranger, "--cluster", "prod"]);
    fs::copy(format!("{stranger}/ca.key"), format!("{dir}/ca.key")).unwrap();
    let mismatch = refused(78, &node);
    assert!(mismatch.contains("ca.key does not fit") && mismatch.contains("ca.pem"), "{mismatch}");
    done(&["cert", "node", "n1", "--dir", &stranger]);
    for file in ["n1.pem", "n1.key"] {
        fs::copy(format!("{stranger}/{file}"), format!("{dir}/{file}")).unwrap();
    }
    let strange = refused(78, &["cert", "show", "--dir", &dir]);
    assert!(
        strange.contains("error: certificate of n1") && strange.contains("of no authority in"),
        "{strange}"
    );
    fs::write(format!("{dir}/ca.pem"), "").unwrap();
    assert!(refused(78, &node).contains("has no certificate in it"));
}
