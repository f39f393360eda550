//! Three nodes in one process.

use keepwarm_config::{Bootstrap, LocalCluster};
use keepwarm_transport::certificate::Authority;
use keepwarm_types::ShardCount;

use super::*;

const NODES: u16 = 3;

/// What `keepwarm init` would write, on ports that are free.
fn files(folder: &Path, shards: u64) -> Config {
    let base = 7000;
    let local = LocalCluster {
        hbm: Bytes(8 << 20),
        pinned: Bytes(32 << 20),
        ..LocalCluster::new("three", NODES, base, ShardCount::new(shards).unwrap())
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

/// A cluster at work, by a changed configuration.
pub(crate) async fn started(folder: &Path, shards: u64, change: impl FnOnce(&mut Config)) -> Vec<Node> {
    let mut config = files(folder, shards);
    change(&mut config);
    let names: Vec<_> = config.nodes.iter().map(|node| node.name.clone()).collect();
    let starting = names.iter().map(|name| Node::start(config.clone(), name));
    futures::future::join_all(starting).await.into_iter().collect::<Result<_, _>>().unwrap()
}

/// A session of `bytes` at one of the nodes, with every copy in place.
pub(crate) async fn session(handle: &Handle, bytes: &[u8]) -> SessionKey {
    let request = || CreateRequest {
        id: None,
        layout: layout(Order::Token),
        protect: Protect::For(Millis(600_000)),
        ttl: None,
        labels: Labels::new(),
        near: None,
    };
    let made = std::sync::Mutex::new(None);
    until("a shard of the node takes a session", || async {
        let created = handle.create(&tenant(), request()).await;
        *made.lock().unwrap() = created.ok().map(|(info, _)| info.manifest.key.clone());
        made.lock().unwrap().is_some()
    })
    .await;
    let key = made.into_inner().unwrap().unwrap();
    until("it is written", || async { append(handle, &key, 0, bytes).await.is_ok() }).await;
    whole(handle, &key).await;
    key
}

/// A cluster at work, and a session of `bytes` at its first node with every copy in place.
pub(crate) async fn cluster(folder: &Path, bytes: &[u8]) -> (Vec<Node>, SessionKey) {
    let nodes = started(folder, 4, |_| {}).await;
    let key = session(&nodes[0].handle(), bytes).await;
    (nodes, key)
}

pub(crate) async fn whole(handle: &Handle, key: &SessionKey) {
    until("both copies are there", || async {
        handle.get(key).await.is_ok_and(|info| info.manifest.holders.len() == 2)
    })
    .await;
}

pub(crate) async fn end(nodes: Vec<Node>) {
    futures::future::join_all(nodes.into_iter().map(|node| node.shutdown(DEADLINE))).await;
}
