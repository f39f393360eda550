use std::path::Path;
use std::time::{Duration, Instant};

use keepwarm_config::{BatchConfig, Config, ModelConfig, SingleNode};
use keepwarm_core::session::Etag;
use keepwarm_core::shard::Refusal;
use keepwarm_node::{Error, Handle, Node};
use keepwarm_test_devices::gpus;
use keepwarm_types::{Bytes, SessionId, SessionKey, Source, Tier};
use uuid::Uuid;

use super::Service;
use crate::chat::{
    ChatBackend, ChatError, ChatEvent, ChatMessage, ChatRequest, Cold, EVENTS_AHEAD, Finished, Prompt,
    SessionRef, Started,
};

const DEADLINE: Duration = Duration::from_secs(20);

struct Bench {
    node: Node,
    handle: Handle,
    service: Service,
}

impl Bench {
    /// Ends the node, and lets go of its GPU, so that the next one may have it.
    async fn end(self) {
        let Self { node, handle, service } = self;
        drop((handle, service));
        node.shutdown(DEADLINE).await;
    }
}

async fn bench(folder: Option<&Path>, hbm: u64) -> Bench {
    let model = ModelConfig {
        name: "tiny".to_owned(),
        source: "tiny:5".to_owned(),
        instances: (1, 1),
        batch: BatchConfig::default(),
    };
    let config = Config::single(SingleNode {
        name: "n1".parse().unwrap(),
        http: "127.0.0.1:0".to_owned(),
        gpus: gpus(Bytes(hbm), 1),
        pinned: Bytes(32 << 20),
        data_dir: folder.map(Path::to_owned),
        models: vec![model.clone()],
    });
    let deadline = Instant::now() + DEADLINE;
    let node = loop {
        match Node::start(config.clone(), &"n1".parse().unwrap()).await {
            Ok(node) => break node,
            // The node before may still be closing its catalog.
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    let handle = node.handle();
    let service = Service::start(&handle, &[model]).unwrap();
    Bench { node, handle, service }
}

fn session(n: u128) -> SessionId {
    SessionId::new(Uuid::from_u128(0x4000_8000_0000_0000_0000 + n)).unwrap()
}

fn key(n: u128) -> SessionKey {
    SessionKey::new("default".parse().unwrap(), session(n))
}

fn message(role: &str, content: &str) -> ChatMessage {
    ChatMessage { role: role.to_owned(), content: content.to_owned() }
}

fn request(id: Option<u128>, messages: &[ChatMessage]) -> ChatRequest {
    ChatRequest {
        tenant: "default".parse().unwrap(),
        session: id.map(|id| SessionRef { id: session(id), if_match: None, cold: None }),
        model: "tiny".to_owned(),
        prompt: Prompt::Messages(messages.to_vec()),
        max_tokens: Some(12),
        temperature: 0.0,
        top_p: 1.0,
        seed: Some(1),
        stop: Vec::new(),
        idempotency_key: None,
    }
}

async fn answer(service: &Service, request: ChatRequest) -> Result<(Started, String, Finished), ChatError> {
    let mut events = service.chat(request).await?;
    let (mut started, mut text) = (None, String::new());
    loop {
        match events.recv().await.expect("the answer broke off") {
            ChatEvent::Started(begun) => started = Some(begun),
            ChatEvent::Text(piece) => text.push_str(&piece),
            ChatEvent::Finished(finished) => {
                return Ok((started.expect("started comes first"), text, finished));
            }
            ChatEvent::Failed(error) => return Err(error),
        }
    }
}

/// Three turns; `between` may do its worst after each.
async fn conversation<F: AsyncFnMut(Bench) -> Bench>(mut bench: Bench, mut between: F) -> (Bench, Vec<u32>) {
    let mut history = vec![message("system", &"A long text. ".repeat(12))];
    for question in ["what?", "and then?", "why so?"] {
        history.push(message("user", question));
        let (_, text, finished) = answer(&bench.service, request(Some(1), &history)).await.unwrap();
        assert!(finished.etag.is_some() && !finished.uncached);
        history.push(message("assistant", &text));
        bench = between(bench).await;
    }
    let (_, transcript) = bench.handle.transcript(&key(1)).await.unwrap();
    (bench, transcript.tokens)
}

//= GUARANTEES.md#G7
#[tokio::test(flavor = "multi_thread")]
async fn evicted_or_killed_a_conversation_goes_on_with_the_same_tokens() {
    let (undisturbed, expected) = conversation(bench(None, 8 << 20).await, async |bench| bench).await;
    undisturbed.end().await;
    let (evicted, tokens) = conversation(bench(None, 8 << 20).await, async |bench| {
        bench.handle.demote(&key(1), Tier::Pinned).await.unwrap();
        bench
    })
    .await;
    assert_eq!(tokens, expected, "evicted from HBM");
    evicted.end().await;
    let (damaged, tokens) = conversation(bench(None, 8 << 20).await, async |bench| {
        bench.handle.demote(&key(1), Tier::Pinned).await.unwrap();
        bench.handle.flip_pinned_bit(&key(1)).await.unwrap();
        bench
    })
    .await;
    assert_eq!(tokens, expected, "its pinned bytes damaged");
    damaged.end().await;
    let folder = tempfile::tempdir().unwrap();
    let (restarted, tokens) = conversation(bench(Some(folder.path()), 8 << 20).await, async |old| {
        old.end().await;
        bench(Some(folder.path()), 8 << 20).await
    })
    .await;
    assert_eq!(tokens, expected, "restarted between turns");
    restarted.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_turn_reuses_the_first_ones_state() {
    let bench = bench(None, 8 << 20).await;
    let mut history = vec![message("user", &"word ".repeat(30))];
    let (first, text, _) = answer(&bench.service, request(Some(1), &history)).await.unwrap();
    assert_eq!((first.source, first.cached_tokens), (Source::None, 0));
    history.extend([message("assistant", &text), message("user", "more")]);
    let (second, ..) = answer(&bench.service, request(Some(1), &history)).await.unwrap();
    assert_eq!(second.source, Source::Hbm);
    assert!(second.cached_tokens + 1 >= first.prompt_tokens, "{second:?}");
    bench.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lossy_conversation_is_evicted_and_answers_on_from_what_came_back() {
    let bench = bench(None, 8 << 20).await;
    let call = |cold, history: &[ChatMessage]| {
        let session = Some(SessionRef { id: session(1), if_match: None, cold });
        ChatRequest { session, ..request(None, history) }
    };
    let mut history = vec![message("user", &"word ".repeat(30))];
    let (first, text, _) = answer(&bench.service, call(Some(Cold::Fp8), &history)).await.unwrap();
    bench.handle.settled(&key(1)).await.unwrap();
    let manifest = bench.handle.get(&key(1)).await.unwrap().manifest;
    assert!(manifest.layout.is_lossy() && manifest.stored_bytes().0 * 10 < manifest.raw_bytes().0 * 6);
    bench.handle.demote(&key(1), Tier::Pinned).await.unwrap();
    history.extend([message("assistant", &text), message("user", "more")]);
    let refused = answer(&bench.service, call(Some(Cold::Exact), &history)).await.unwrap_err();
    assert!(matches!(refused, ChatError::Store(Error::Refused(Refusal::Conflict(_)))), "{refused:?}");
    let (second, text, finished) = answer(&bench.service, call(None, &history)).await.unwrap();
    assert_eq!(second.source, Source::Pinned);
    assert!(second.cached_tokens + 1 >= first.prompt_tokens && !finished.uncached, "{second:?}");
    // A fork has its parent's layout.
    history.truncate(1);
    history.extend([message("assistant", &text), message("user", "something else")]);
    let (fork, ..) = answer(&bench.service, call(Some(Cold::Fp8), &history)).await.unwrap();
    assert!(fork.diverged_at.is_some(), "{fork:?}");
    bench.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_history_that_leaves_the_stored_one_forks_and_destroys_nothing() {
    let bench = bench(None, 8 << 20).await;
    let start = [message("user", &"tell me of the sea ".repeat(5))];
    let (_, text, _) = answer(&bench.service, request(Some(1), &start)).await.unwrap();
    let go_on = |question: &str| {
        let mut history = start.to_vec();
        history.extend([message("assistant", &text), message("user", question)]);
        history
    };
    answer(&bench.service, request(Some(1), &go_on("deep?"))).await.unwrap();
    let (other, ..) = answer(&bench.service, request(Some(1), &go_on("cold?"))).await.unwrap();
    let child = other.session.unwrap();
    assert_ne!(child, session(1));
    let (_, stored) = bench.handle.transcript(&key(1)).await.unwrap();
    assert_eq!(other.diverged_at, Some(stored.messages[1].tokens_end));
    assert!(other.cached_tokens > 0, "the fork shares the parent's blocks");
    assert_eq!(stored.messages[2].content, "deep?");
    let (_, branch) = bench.handle.transcript(&SessionKey::new(key(1).tenant, child)).await.unwrap();
    assert_eq!(branch.messages[2].content, "cold?");
    let mut again = go_on("cold?");
    again.extend([message("assistant", &branch.messages[3].content), message("user", "go on")]);
    let (third, ..) = answer(&bench.service, request(Some(1), &again)).await.unwrap();
    assert_eq!((third.session, third.diverged_at), (Some(child), None), "the branch is found again");
    bench.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn if_match_names_what_the_messages_follow() {
    let bench = bench(None, 8 << 20).await;
    let (.., first) = answer(&bench.service, request(Some(1), &[message("user", "one")])).await.unwrap();
    bench.handle.settled(&key(1)).await.unwrap();
    let following = |etag: Option<Etag>| {
        let mut call = request(Some(1), &[message("user", "two")]);
        call.session = Some(SessionRef { id: session(1), if_match: etag, cold: None });
        call
    };
    answer(&bench.service, following(first.etag)).await.unwrap();
    let (_, stored) = bench.handle.transcript(&key(1)).await.unwrap();
    assert_eq!(stored.messages.len(), 4);
    let stale = answer(&bench.service, following(first.etag)).await.unwrap_err();
    assert!(matches!(stale, ChatError::Store(_)), "{stale}");
    bench.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_room_a_turn_runs_uncached_and_says_so() {
    // 2 MiB of HBM: less than a long answer's working blocks.
    let bench = bench(None, 2 << 20).await;
    let history = [message("user", &"x".repeat(6000))];
    let mut call = request(Some(1), &history);
    call.max_tokens = Some(2100);
    call.stop = vec!["\u{1}".to_owned()];
    let roomy = request(None, &history);
    let (.., finished) =
        answer(&bench.service, ChatRequest { max_tokens: Some(3), ..call.clone() }).await.unwrap();
    let (_, text, _) = answer(&bench.service, ChatRequest { max_tokens: Some(3), ..roomy }).await.unwrap();
    let (_, transcript) = bench.handle.transcript(&key(1)).await.unwrap();
    assert_eq!(transcript.messages[1].content, text, "the same answer with and without room");
    assert!(finished.etag.is_some());
    let filler =
        keepwarm_types::Owner { tenant: key(1).tenant, birth: keepwarm_types::Birth::from_random(1) };
    let held = bench.handle.scratch(&filler, keepwarm_types::GpuIndex(0), Bytes(1 << 20), 1).await;
    let longer = [history[0].clone(), message("assistant", &text), message("user", "y")];
    let (started, _, finished) =
        answer(&bench.service, ChatRequest { max_tokens: Some(2000), ..request(Some(1), &longer) })
            .await
            .unwrap();
    drop(held);
    assert!(finished.uncached && started.source == Source::None, "{started:?} {finished:?}");
    bench.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn eight_at_once_are_answered_as_each_alone() {
    let bench = bench(None, 16 << 20).await;
    let prompts: Vec<_> =
        (0..8).map(|n| vec![message("user", &format!("question {n} ").repeat(n + 1))]).collect();
    let mut alone = Vec::new();
    for prompt in &prompts {
        alone.push(answer(&bench.service, request(None, prompt)).await.unwrap().1);
    }
    let together = prompts.iter().enumerate().map(|(n, prompt)| {
        let (service, call) = (bench.service.clone(), request(Some(100 + n as u128), prompt));
        tokio::spawn(async move { answer(&service, call).await.unwrap().1 })
    });
    let together: Vec<_> = together.collect();
    for (alone, together) in alone.into_iter().zip(together) {
        assert_eq!(alone, together.await.unwrap());
    }
    bench.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_key_gets_the_same_turn_and_bad_calls_say_why() {
    let bench = bench(None, 8 << 20).await;
    let mut call = request(Some(1), &[message("user", "once")]);
    call.idempotency_key = Some("k1".to_owned());
    let (_, first, a) = answer(&bench.service, call.clone()).await.unwrap();
    let (_, second, b) = answer(&bench.service, call.clone()).await.unwrap();
    assert_eq!((first, a.etag), (second, b.etag));
    call.prompt = Prompt::Messages(vec![message("user", "other")]);
    assert!(matches!(answer(&bench.service, call).await, Err(ChatError::InvalidField { .. })));
    let unknown = ChatRequest { model: "nope".to_owned(), ..request(None, &[message("user", "x")]) };
    assert!(matches!(answer(&bench.service, unknown).await, Err(ChatError::UnknownModel { .. })));
    let long = request(None, &[message("user", &"x".repeat(9000))]);
    assert!(matches!(answer(&bench.service, long).await, Err(ChatError::TooLong { .. })));
    bench.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_with_one_key_at_once_make_one_turn() {
    let bench = bench(None, 8 << 20).await;
    let mut call = request(Some(1), &[message("user", "once")]);
    call.idempotency_key = Some("k1".to_owned());
    // Sampled with seeds of their own, two turns would not answer alike.
    (call.temperature, call.seed) = (1.0, None);
    let calls: Vec<_> = (0..6)
        .map(|_| {
            let (service, call) = (bench.service.clone(), call.clone());
            tokio::spawn(async move { answer(&service, call).await.unwrap() })
        })
        .collect();
    let mut answers = Vec::new();
    for call in calls {
        let (started, text, finished) = call.await.unwrap();
        answers.push((started.session, text, finished.etag));
    }
    assert!(answers.iter().all(|answer| *answer == answers[0]), "{answers:?}");
    let (info, transcript) = bench.handle.transcript(&key(1)).await.unwrap();
    assert_eq!((transcript.messages.len(), info.manifest.branches.len()), (2, 0));
    for change in [
        |call: &mut ChatRequest| call.max_tokens = Some(11),
        |call: &mut ChatRequest| call.temperature = 0.5,
        |call: &mut ChatRequest| call.top_p = 0.5,
        |call: &mut ChatRequest| call.seed = Some(4),
        |call: &mut ChatRequest| call.stop = vec!["x".to_owned()],
    ] {
        let mut other = call.clone();
        change(&mut other);
        assert!(matches!(answer(&bench.service, other).await, Err(ChatError::InvalidField { .. })));
    }
    bench.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_whose_first_call_went_away_is_free_for_the_next() {
    let bench = bench(None, 8 << 20).await;
    let mut call = request(Some(1), &[message("user", "once")]);
    call.idempotency_key = Some("k1".to_owned());
    let long = ChatRequest { max_tokens: Some(4000), ..call.clone() };
    drop(bench.service.chat(long).await.unwrap());
    let deadline = Instant::now() + DEADLINE;
    loop {
        match answer(&bench.service, call.clone()).await {
            Ok((_, _, finished)) => break assert!(finished.etag.is_some()),
            // Until the first one has noticed that its reader is gone, the key stands for it.
            Err(ChatError::InvalidField { .. }) => {
                assert!(Instant::now() < deadline, "the key is still taken")
            }
            Err(error) => panic!("{error}"),
        }
        tokio::task::yield_now().await;
    }
    bench.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_is_behind_gets_the_whole_answer() {
    let bench = bench(None, 8 << 20).await;
    let call = ChatRequest { max_tokens: Some(300), ..request(Some(1), &[message("user", "at length")]) };
    let mut events = bench.service.chat(call).await.unwrap();
    let deadline = Instant::now() + DEADLINE;
    let said = loop {
        let (_, transcript) = bench.handle.transcript(&key(1)).await.unwrap();
        if let Some(message) = transcript.messages.get(1) {
            break message.content.clone();
        }
        assert!(Instant::now() < deadline, "the turn was not committed");
        tokio::time::sleep(Duration::from_millis(2)).await;
    };
    let (mut text, mut pieces) = (String::new(), 0);
    loop {
        match events.recv().await.expect("the answer broke off") {
            ChatEvent::Started(_) => {}
            ChatEvent::Text(piece) => {
                text.push_str(&piece);
                pieces += 1;
            }
            ChatEvent::Finished(_) => break,
            ChatEvent::Failed(error) => panic!("{error}"),
        }
    }
    assert!(pieces >= EVENTS_AHEAD - 1, "the answer had no more than {pieces} pieces");
    assert_eq!(text, said);
    bench.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_diverging_turn_that_is_given_up_leaves_no_fork() {
    let bench = bench(None, 8 << 20).await;
    answer(&bench.service, request(Some(1), &[message("user", "one")])).await.unwrap();
    let call = ChatRequest { max_tokens: Some(4000), ..request(Some(1), &[message("user", "other")]) };
    let mut events = bench.service.chat(call).await.unwrap();
    let Some(ChatEvent::Started(started)) = events.recv().await else { panic!("it did not start") };
    drop(events);
    let child = SessionKey::new(key(1).tenant, started.session.unwrap());
    assert_ne!(child, key(1));
    let deadline = Instant::now() + DEADLINE;
    while bench.handle.get(&child).await.is_ok() {
        assert!(Instant::now() < deadline, "the fork is still there");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    bench.end().await;
}
