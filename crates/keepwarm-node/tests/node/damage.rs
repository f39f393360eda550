//! A copy that is damaged is repaired from another holder's.

use super::three::{cluster, end, whole};
use super::*;

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
