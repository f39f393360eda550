//! Three nodes in one process: a copy that is damaged is repaired from another holder's.

use keepwarm_config::{Bootstrap, LocalCluster};
use keepwarm_transport::certificate::Authority;
use keepwarm_types::ShardCount;

use super::*;

const NODES: u16 = 3;

/// What `keepwarm init` would write, on ports that are free.
fn files(folder: &Path) -> Config {
    let base = 7000;
    let local = LocalCluster {
        hbm: Bytes(8 << 20),
        pinned: Bytes(32 << 20),
        ..LocalCluster::new("damage", NODES, base, ShardCount::new(4).unwrap())
    };
    let mut text = local.render().unwrap();
    // All are held until all are known, so that no two are the same.
    let held: Vec<_> = (0..NODES).map(|_| std::net::UdpSocket::bind("127.0.0.1:0").unwrap()).collect();
    for (node, socket) in (1..=NODES).zip(&held) {
        let free = socket.local_addr().unwrap().to_string();
        text = text.replace(&format!("127.0.0.1:{}", base + 100 + node), &free);
    }
    let config = Config::parse(&folder.join("cluster.toml").display().to_string(), &text).unwrap();
    std::fs::write(folder.join(Bootstrap::FILE), Bootstrap::new(&config).render()).unwrap();
    let certificates = folder.join("certs");
    std::fs::create_dir(&certificates).unwrap();
    let authority = Authority::generate(&config.name, 1).unwrap();
    std::fs::write(certificates.join("ca.pem"), authority.certificate()).unwrap();
    for node in &config.nodes {
        let issued = authority.issue(&node.name, 1).unwrap();
        std::fs::write(certificates.join(format!("{}.pem", node.name)), issued.certificate).unwrap();
        std::fs::write(certificates.join(format!("{}.key", node.name)), issued.key).unwrap();
    }
    config
}

/// A cluster at work, and a session of `bytes` at its first node with every copy in place.
async fn cluster(folder: &Path, bytes: &[u8]) -> (Vec<Node>, SessionKey) {
    let config = files(folder);
    let names: Vec<_> = config.nodes.iter().map(|node| node.name.clone()).collect();
    let starting = names.iter().map(|name| Node::start(config.clone(), name));
    let nodes: Vec<Node> =
        futures::future::join_all(starting).await.into_iter().collect::<Result<_, _>>().unwrap();
    let handle = nodes[0].handle();
    let request = || CreateRequest {
        id: None,
        layout: layout(Order::Token),
        protect: Protect::For(Millis(600_000)),
        ttl: None,
        labels: Labels::new(),
        near: None,
    };
    let made = std::sync::Mutex::new(None);
    until("a shard of the first node takes a session", || async {
        let created = handle.create(&tenant(), request()).await;
        *made.lock().unwrap() = created.ok().map(|(info, _)| info.manifest.key.clone());
        made.lock().unwrap().is_some()
    })
    .await;
    let key = made.into_inner().unwrap().unwrap();
    until("it is written", || async { append(&handle, &key, 0, bytes).await.is_ok() }).await;
    whole(&handle, &key).await;
    (nodes, key)
}

async fn whole(handle: &Handle, key: &SessionKey) {
    until("both copies are there", || async {
        handle.get(key).await.is_ok_and(|info| info.manifest.holders.len() == 2)
    })
    .await;
}

async fn end(nodes: Vec<Node>) {
    futures::future::join_all(nodes.into_iter().map(|node| node.shutdown(DEADLINE))).await;
}

//= GUARANTEES.md#G5
#[tokio::test(flavor = "multi_thread")]
async fn a_restore_that_meets_damage_goes_on_with_another_holders_copy() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = pattern(3, 100);
    let (nodes, key) = cluster(folder.path(), &bytes).await;
    let handle = nodes[0].handle();
    for _ in 0..2 {
        handle.flip_pinned_bit(&key).await.unwrap();
        let activation = handle.activate(&key, ActivateRequest::default()).await.unwrap();
        assert_eq!(activation.source, Source::Peer);
        assert_eq!(activation.manifest.state, State::Warm);
        handle.release(&key, activation.lease.id).await.unwrap();
        drop(activation);
        assert_eq!(read(&handle, &key, Selection::default()).await.unwrap(), bytes);
        whole(&handle, &key).await;
        handle.demote(&key, Tier::Pinned).await.unwrap();
    }
    end(nodes).await;
}

//= GUARANTEES.md#G5
#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_meets_damage_is_told_and_the_next_one_reads_another_holders_copy() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = pattern(4, 100);
    let (nodes, key) = cluster(folder.path(), &bytes).await;
    let handle = nodes[0].handle();
    // A fork shares the blocks, and with them the damage.
    let fork =
        ForkRequest { id: None, length: None, labels: None, keep_messages: None, branch: false, lease: None };
    let child = handle.fork(&key, fork).await.unwrap().1.manifest.key.clone();
    handle.flip_pinned_bit(&key).await.unwrap();
    let error = read(&handle, &key, Selection::default()).await.unwrap_err();
    assert!(matches!(error, Error::Corrupt { at: "read", .. }), "{error}");
    for session in [&key, &child] {
        until("it reads as it was written", || async {
            read(&handle, session, Selection::default()).await.is_ok_and(|read| read == bytes)
        })
        .await;
        whole(&handle, session).await;
    }
    end(nodes).await;
}
