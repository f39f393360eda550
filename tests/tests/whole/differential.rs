//! Random calls over HTTP against a model in memory: every status, length, revision and byte must agree.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeMap;

use keepwarm_tests::{Server, Setup, paged_layout, send};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use reqwest::Method;
use serde_json::json;
use uuid::Uuid;

/// Bytes of a token, and tokens of a block, in the layout.
const TOKEN: usize = 64;
const BLOCK: usize = 16;
const CALLS: usize = 1_500;
const SESSIONS: u128 = 6;

/// What a session should be.
#[derive(Debug, Clone, PartialEq)]
enum State {
    Live { bytes: Vec<u8>, revision: u64 },
    Deleted,
}

struct Test {
    server: Server,
    rng: ChaCha8Rng,
    model: BTreeMap<Uuid, State>,
    seed: u64,
    call: usize,
}

impl Test {
    fn below(&mut self, end: usize) -> usize {
        self.rng.random_range(0..end)
    }

    fn id(&mut self) -> Uuid {
        Uuid::from_u128(0x4000_8000_0000_0000_0000 + self.rng.random_range(0..SESSIONS))
    }

    fn at(&self) -> String {
        format!("seed {}, call {}", self.seed, self.call)
    }

    /// The status of a call on a session that is not there.
    fn absence(&self, id: Uuid) -> Option<u16> {
        match self.model.get(&id) {
            Some(State::Live { .. }) => None,
            Some(State::Deleted) => Some(410),
            None => Some(404),
        }
    }

    fn live(&mut self, id: Uuid) -> (&mut Vec<u8>, &mut u64) {
        match self.model.get_mut(&id) {
            Some(State::Live { bytes, revision }) => (bytes, revision),
            other => panic!("{id} is {other:?}"),
        }
    }

    async fn create(&mut self, id: Uuid) {
        let body = json!({"id": id, "layout": paged_layout()});
        let answer = self.server.post("/v1/sessions", &body).await;
        let expected = match self.model.get(&id) {
            None => 201,
            Some(State::Live { .. }) => 200,
            Some(State::Deleted) => 410,
        };
        assert_eq!(answer.status, expected, "{}: {:?}", self.at(), answer.json());
        if expected == 201 {
            self.model.insert(id, State::Live { bytes: Vec::new(), revision: 0 });
        }
    }

    async fn append(&mut self, id: Uuid) {
        let count = 1 + self.below(40);
        let body: Vec<u8> = (0..count * TOKEN).map(|_| self.rng.random()).collect();
        let slip = if self.below(5) == 0 { 1 + self.below(3) } else { 0 };
        let length = match self.model.get(&id) {
            Some(State::Live { bytes, .. }) => bytes.len() / TOKEN,
            _ => 0,
        };
        let path = format!("/v1/sessions/{id}/parts/kv?offset={}", length + slip);
        let answer = self.server.patch(&path, body.clone()).await;
        let expected = self.absence(id).unwrap_or(if slip > 0 { 409 } else { 200 });
        assert_eq!(answer.status, expected, "{}: {:?}", self.at(), answer.json());
        if expected == 200 {
            let (bytes, revision) = self.live(id);
            bytes.extend(body);
            *revision += 1;
            let (tokens, revision) = (bytes.len() / TOKEN, *revision);
            assert_eq!(answer.json()["length_tokens"], tokens, "{}", self.at());
            assert_eq!(answer.json()["revision"], revision, "{}", self.at());
        }
    }

    async fn replace(&mut self, id: Uuid) {
        let count = self.below(50);
        let extra = if self.below(6) == 0 { 1 } else { 0 };
        let body: Vec<u8> = (0..count * TOKEN + extra).map(|_| self.rng.random()).collect();
        let answer = self.server.put(&format!("/v1/sessions/{id}/parts/kv"), body.clone()).await;
        let expected = self.absence(id).unwrap_or(if extra > 0 { 422 } else { 200 });
        assert_eq!(answer.status, expected, "{}: {:?}", self.at(), answer.json());
        if expected == 200 {
            let (bytes, revision) = self.live(id);
            *bytes = body;
            *revision += 1;
        }
    }

    async fn read(&mut self, id: Uuid) {
        let path = format!("/v1/sessions/{id}/parts/kv");
        let expected = match self.model.get(&id) {
            Some(State::Live { bytes, revision }) => Ok((bytes.clone(), *revision)),
            Some(State::Deleted) => Err(410),
            None => Err(404),
        };
        let answer = self.server.get(&path).await;
        let at = self.at();
        let (bytes, revision) = match expected {
            Err(status) => return assert_eq!(answer.status, status, "{at}"),
            Ok((bytes, _)) if bytes.is_empty() => {
                return assert_eq!(answer.status, 404, "{at}: {:?}", answer.json());
            }
            Ok(known) => known,
        };
        assert_eq!((answer.status, &answer.body), (200, &bytes), "{at}");
        assert!(answer.header("etag").unwrap().ends_with(&format!("-{revision}\"")), "{at}");
        let (one, other) = (self.below(bytes.len()), self.below(bytes.len()));
        let (first, last) = (one.min(other), one.max(other));
        let range = format!("bytes={first}-{last}");
        let answer = send(self.server.request(Method::GET, &path).header("range", range)).await;
        assert_eq!((answer.status, &answer.body[..]), (206, &bytes[first..=last]), "{at}");
    }

    async fn truncate(&mut self, id: Uuid) {
        let to = self.below(120);
        let path = format!("/v1/sessions/{id}/truncate");
        let answer = self.server.post(&path, &json!({"length_tokens": to})).await;
        let have = match self.model.get(&id) {
            Some(State::Live { bytes, .. }) => bytes.len() / TOKEN,
            _ => 0,
        };
        let expected = self.absence(id).unwrap_or(if to > have { 422 } else { 200 });
        assert_eq!(answer.status, expected, "{}: {:?}", self.at(), answer.json());
        if expected == 200 {
            // A cut inside a block keeps the whole blocks before it.
            let kept = if to == have { to } else { to / BLOCK * BLOCK };
            let outcome = if kept == to { "accepted" } else { "clipped" };
            assert_eq!(answer.json()["outcome"], outcome, "{}", self.at());
            let (bytes, revision) = self.live(id);
            bytes.truncate(kept * TOKEN);
            *revision += 1;
        }
    }

    async fn fork(&mut self, id: Uuid) {
        let child = self.id();
        let answer = self.server.post(&format!("/v1/sessions/{id}/fork"), &json!({"id": child})).await;
        let expected = self.absence(id).unwrap_or(if self.model.contains_key(&child) { 409 } else { 201 });
        // All ids of this test lie in one shard.
        assert_eq!(answer.status, expected, "{}: {:?}", self.at(), answer.json());
        if expected == 201 {
            let bytes = self.live(id).0.clone();
            self.model.insert(child, State::Live { bytes, revision: 0 });
        }
    }

    async fn delete(&mut self, id: Uuid) {
        let path = format!("/v1/sessions/{id}");
        let answer = send(self.server.request(Method::DELETE, &path)).await;
        let expected = self.absence(id).unwrap_or(200);
        assert_eq!(answer.status, expected, "{}: {:?}", self.at(), answer.json());
        if expected == 200 {
            self.model.insert(id, State::Deleted);
        }
    }

    /// Through HBM and back: nothing that a reader could notice.
    async fn visit(&mut self, id: Uuid) {
        let path = format!("/v1/sessions/{id}");
        let answer = self.server.post(&format!("{path}/activate"), &json!({})).await;
        let expected = self.absence(id).unwrap_or(200);
        assert_eq!(answer.status, expected, "{}: {:?}", self.at(), answer.json());
        if expected == 200 {
            let lease = answer.json()["lease"]["id"].clone();
            let released = self.server.post(&format!("{path}/release"), &json!({"lease": lease})).await;
            assert_eq!(released.status, 200, "{}: {:?}", self.at(), released.json());
            self.server.post(&format!("{path}/demote"), &json!({"tier": "pinned"})).await;
        }
    }

    async fn list(&mut self) {
        let answer = self.server.get("/v1/sessions?limit=1000").await.json();
        let listed: Vec<_> =
            answer["sessions"].as_array().unwrap().iter().map(|one| one["id"].clone()).collect();
        let live = self.model.iter().filter(|(_, state)| **state != State::Deleted);
        let expected: Vec<_> = live.map(|(id, _)| json!(id)).collect();
        assert_eq!(listed, expected, "{}", self.at());
    }
}

async fn run(seed: u64) {
    let server = Server::start(None, Setup::default()).await;
    let rng = ChaCha8Rng::seed_from_u64(seed);
    let mut test = Test { server, rng, model: BTreeMap::new(), seed, call: 0 };
    for call in 0..CALLS {
        test.call = call;
        let id = test.id();
        match test.below(24) {
            0..3 => test.create(id).await,
            3..9 => test.append(id).await,
            9..11 => test.replace(id).await,
            11..17 => test.read(id).await,
            17 | 18 => test.truncate(id).await,
            19 => test.fork(id).await,
            20 => test.visit(id).await,
            21 => test.list().await,
            // Seldom: the ids are few, and an ended one stays so for a day.
            _ if call % 60 == 59 => test.delete(id).await,
            _ => test.read(id).await,
        }
    }
    test.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_agrees_with_a_model_in_memory() {
    for seed in 0..4 {
        run(seed).await;
    }
}
