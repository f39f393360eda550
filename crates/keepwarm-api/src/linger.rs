//! A refused request's body is read to its end, within limits: a client that is still sending would else find
//! its connection reset, and the refusal lost with it.
//!
//! See RFC 9112, 9.6 on closing with unread data. A client that asks `Expect: 100-continue` sends nothing
//! before it is told to, so there is nothing to read.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::extract::Request;
use axum::http::header;
use axum::middleware::Next;
use axum::response::Response;
use bytes::Bytes as Buffer;
use http_body_util::BodyExt;
use hyper::body::{Frame, SizeHint};
use tokio::sync::oneshot;

/// Most bytes of a refused body that are read and thrown away: one large part.
const LINGER_BYTES_MAX: u64 = 256 << 20;
/// Longest time that is spent on it.
const LINGER_TIME: Duration = Duration::from_secs(5);

/// A body that goes back to where it came from when its reader is done with it.
struct Lent {
    body: Body,
    back: Option<oneshot::Sender<Body>>,
}

impl HttpBody for Lent {
    type Data = Buffer;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Buffer>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(back) = self.back.take() {
            // Nobody waits for the body of a request that was served.
            let _ = back.send(std::mem::take(&mut self.body));
        }
    }
}

/// Wraps a request's body, and reads the rest of it where the answer is a refusal.
pub(crate) async fn linger(request: Request, next: Next) -> Response {
    let hopeless = request.body().size_hint().lower() > LINGER_BYTES_MAX;
    if hopeless || request.body().is_end_stream() || request.headers().contains_key(header::EXPECT) {
        return next.run(request).await;
    }
    let (parts, body) = request.into_parts();
    let (back, returned) = oneshot::channel();
    let lent = Body::new(Lent { body, back: Some(back) });
    let response = next.run(Request::from_parts(parts, lent)).await;
    let refused = response.status().is_client_error() || response.status().is_server_error();
    if refused && let Ok(rest) = returned.await {
        // What cannot be read in time is cut with its connection.
        let _ = tokio::time::timeout(LINGER_TIME, discard(rest)).await;
    }
    response
}

async fn discard(mut body: Body) {
    let mut left = LINGER_BYTES_MAX;
    while let Some(Ok(frame)) = body.frame().await {
        let read = frame.data_ref().map_or(0, |data| data.len() as u64);
        let Some(rest) = left.checked_sub(read) else { return };
        left = rest;
    }
}
