//! Serving connections: bounded in number, cut when they stall, ended in order.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::ConnectInfo;
use axum::http::StatusCode;
use axum::response::IntoResponse;
use axum::{Extension, Router};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tower::ServiceExt;

use crate::problem::Problem;

/// Connections at once; each costs some tens of KiB besides what its request holds. More wait to be accepted.
pub const CONNECTIONS_MAX: usize = 4096;
/// A client whose body does not go on, or who sends no request head, is cut after this.
pub const SLOW_READER: Duration = Duration::from_secs(30);
/// Longest request head: request line and headers.
const HEAD_BYTES_MAX: usize = 64 << 10;
/// What an HTTP/1 connection reads ahead at most: room for a long head, and for a body to arrive in large pieces.
const READ_AHEAD: usize = 8 * HEAD_BYTES_MAX;
/// Connections that are told at once that the server stops; more wait to be accepted.
const REFUSALS_MAX: usize = 64;

/// Told to requests: turns true once the server stops. What has no end of its own ends then.
#[derive(Debug, Clone)]
pub(crate) struct Stopping(watch::Receiver<bool>);

impl Stopping {
    /// Resolves once the server stops.
    pub(crate) async fn begun(mut self) {
        // An error means that the server is gone, which is the same.
        let _ = self.0.wait_for(|stopping| *stopping).await;
    }
}

/// Serves `router` on `listener` until `shutdown` resolves, then lets present answers end for up to `grace`
/// while every new connection is told 503 `draining`. Gives the number of connections that did not end in time
/// and were cut.
///
/// Dropped, it cuts all connections at once.
///
/// # Errors
/// What the listener says, if it fails for good.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    shutdown: impl Future<Output = ()>,
    grace: Duration,
) -> std::io::Result<usize> {
    let limit = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let stop = hyper_util::server::graceful::GracefulShutdown::new();
    let (stopping, told) = watch::channel(false);
    let router = router.layer(Extension(Stopping(told)));
    let mut connections = JoinSet::new();
    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        while connections.try_join_next().is_some() {}
        let (stream, peer, permit) = tokio::select! {
            accepted = accept(&listener, &limit) => accepted,
            () = &mut shutdown => break,
        };
        let watcher = stop.watcher();
        let service = connection_service(router.clone(), peer);
        connections.spawn(async move {
            let mut builder = auto::Builder::new(TokioExecutor::new());
            builder
                .http1()
                .timer(TokioTimer::new())
                .header_read_timeout(SLOW_READER)
                .max_buf_size(READ_AHEAD);
            builder.http2().timer(TokioTimer::new()).max_header_list_size(HEAD_BYTES_MAX as u32);
            let connection = builder.serve_connection_with_upgrades(
                TokioIo::new(crate::stall::Stall::new(stream, SLOW_READER)),
                service,
            );
            if let Err(error) = watcher.watch(connection.into_owned()).await {
                tracing::debug!(%error, %peer, "connection ended early");
            }
            drop(permit);
        });
    }
    let _ = stopping.send(true);
    tokio::select! {
        all = tokio::time::timeout(grace, stop.shutdown()) => if all.is_ok() { return Ok(0) },
        () = refuse(&listener) => {}
    }
    while connections.try_join_next().is_some() {}
    let cut = connections.len();
    tracing::warn!(cut, "some connections did not end in time and are cut");
    Ok(cut)
}

/// The next connection, with the right to serve it. Nothing is lost when this is dropped.
async fn accept(
    listener: &TcpListener,
    limit: &Arc<Semaphore>,
) -> (TcpStream, SocketAddr, OwnedSemaphorePermit) {
    let permit = Arc::clone(limit).acquire_owned().await.expect("the semaphore is never closed");
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                let _ = stream.set_nodelay(true);
                return (stream, peer, permit);
            }
            Err(error) => {
                // Out of descriptors, or a connection that was gone already: go on after a breath.
                tracing::warn!(%error, "accept failed");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

/// Tells every new connection that the server stops; for ever.
async fn refuse(listener: &TcpListener) {
    let router = Router::new().fallback(async || Problem::from(keepwarm_node::Error::Draining));
    let limit = Arc::new(Semaphore::new(REFUSALS_MAX));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let (stream, peer, permit) = accept(listener, &limit).await;
        let service = connection_service(router.clone(), peer);
        connections.spawn(async move {
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(SLOW_READER)
                .keep_alive(false)
                .serve_connection(TokioIo::new(crate::stall::Stall::new(stream, SLOW_READER)), service);
            if let Err(error) = connection.await {
                tracing::debug!(%error, %peer, "a refused connection ended early");
            }
            drop(permit);
        });
    }
}

/// Bytes of a request's head as HTTP/1 has them on the wire, nearly.
fn head_bytes<B>(request: &hyper::Request<B>) -> usize {
    let target = request.uri().path_and_query().map_or(0, |target| target.as_str().len());
    // A colon, a space and a line's end.
    let headers = request.headers().iter().map(|(name, value)| name.as_str().len() + value.len() + 4);
    target + headers.sum::<usize>()
}

fn connection_service(
    router: Router,
    peer: SocketAddr,
) -> hyper_util::service::TowerToHyperService<
    impl tower::Service<
        hyper::Request<Incoming>,
        Response = axum::response::Response,
        Error = std::convert::Infallible,
        Future: Send,
    > + Clone
    + Send,
> {
    let service = tower::service_fn(move |mut request: hyper::Request<Incoming>| {
        let router = router.clone();
        async move {
            if head_bytes(&request) > HEAD_BYTES_MAX {
                return Ok(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE.into_response());
            }
            request.extensions_mut().insert(ConnectInfo(peer));
            router.oneshot(request).await
        }
    });
    hyper_util::service::TowerToHyperService::new(service)
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use axum::routing::get;
    use futures::StreamExt;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::sync::oneshot;

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(20);

    /// A server whose only answer begins at once and ends when `end` says so.
    struct Bench {
        address: SocketAddr,
        stop: oneshot::Sender<()>,
        end: watch::Sender<bool>,
        server: tokio::task::JoinHandle<std::io::Result<usize>>,
    }

    async fn bench(grace: Duration) -> Bench {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (end, ended) = watch::channel(false);
        let answer = move || {
            let mut ended = ended.clone();
            async move {
                let rest = async move {
                    ended.wait_for(|ended| *ended).await.unwrap();
                    "end"
                };
                let pieces = futures::stream::iter(["begin "]).chain(futures::stream::once(rest));
                Body::from_stream(pieces.map(Ok::<_, std::convert::Infallible>))
            }
        };
        let (stop, stopped) = oneshot::channel::<()>();
        let until = async move { drop(stopped.await) };
        let server = tokio::spawn(serve(listener, Router::new().route("/", get(answer)), until, grace));
        Bench { address, stop, end, server }
    }

    async fn ask(address: SocketAddr, headers: &str) -> TcpStream {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(format!("GET / HTTP/1.1\r\nHost: x\r\n{headers}\r\n").as_bytes()).await.unwrap();
        stream
    }

    async fn read_until(stream: &mut TcpStream, what: &str) -> String {
        let mut text = String::new();
        while !text.contains(what) {
            let mut buffer = [0; 4096];
            let read = tokio::time::timeout(DEADLINE, stream.read(&mut buffer)).await.unwrap().unwrap();
            assert!(read > 0, "no '{what}' in {text}");
            text.push_str(std::str::from_utf8(&buffer[..read]).unwrap());
        }
        text
    }

    #[tokio::test]
    async fn an_answer_under_way_ends_whole_while_new_ones_are_refused() {
        let Bench { address, stop, end, server } = bench(DEADLINE).await;
        let mut under_way = ask(address, "").await;
        read_until(&mut under_way, "begin").await;
        stop.send(()).unwrap();
        // Until the server has noticed, an answer begins as ever.
        let deadline = tokio::time::Instant::now() + DEADLINE;
        loop {
            let text = read_until(&mut ask(address, "Connection: close\r\n").await, "\r\n\r\n").await;
            if text.starts_with("HTTP/1.1 503") {
                assert!(text.contains("retry-after"), "{text}");
                break;
            }
            assert!(tokio::time::Instant::now() < deadline, "{text}");
        }
        assert!(!server.is_finished());
        end.send(true).unwrap();
        read_until(&mut under_way, "end").await;
        assert_eq!(server.await.unwrap().unwrap(), 0);
    }

    #[tokio::test]
    async fn what_does_not_end_in_time_is_cut_and_counted() {
        let Bench { address, stop, end, server } = bench(Duration::from_millis(50)).await;
        let mut under_way = ask(address, "").await;
        read_until(&mut under_way, "begin").await;
        stop.send(()).unwrap();
        assert_eq!(server.await.unwrap().unwrap(), 1);
        drop(end);
    }

    #[tokio::test]
    async fn a_head_beyond_the_limit_is_refused() {
        let Bench { address, stop: _stop, end: _end, .. } = bench(DEADLINE).await;
        let long = |bytes: usize| format!("X-Long: {}\r\n", "x".repeat(bytes));
        read_until(&mut ask(address, &long(HEAD_BYTES_MAX - 100)).await, "HTTP/1.1 200").await;
        read_until(&mut ask(address, &long(HEAD_BYTES_MAX)).await, "HTTP/1.1 431").await;
    }
}
