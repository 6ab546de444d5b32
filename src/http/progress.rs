//! A connection whose peer must take what is written to it.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

/// A stream that fails when a write has made no progress for `timeout`. Time passes only while a
/// write is pending.
#[derive(Debug)]
pub(crate) struct MustProgress<S> {
    stream: S,
    timeout: Duration,
    /// Ends the wait of a pending write.
    stalled: Option<Pin<Box<Sleep>>>,
    /// Number of bytes written.
    written: Arc<AtomicU64>,
}

impl<S> MustProgress<S> {
    pub(crate) fn new(stream: S, timeout: Duration, written: Arc<AtomicU64>) -> Self {
        Self { stream, timeout, stalled: None, written }
    }

    /// Ends the wait after bytes were written.
    fn wrote(
        &mut self,
        cx: &mut Context<'_>,
        result: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(written)) = &result {
            self.written.fetch_add(*written as u64, Ordering::Relaxed);
            self.stalled = None;
        }
        self.wait(cx, result)
    }

    /// Waits with a pending operation for as long as is left.
    fn wait<T>(
        &mut self,
        cx: &mut Context<'_>,
        result: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if result.is_pending() {
            let timeout = self.timeout;
            ready!(self.stalled.get_or_insert_with(|| Box::pin(sleep(timeout))).as_mut().poll(cx));
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        result
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for MustProgress<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for MustProgress<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.wrote(cx, result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write_vectored(cx, bytes);
        self.wrote(cx, result)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.stream).poll_flush(cx);
        self.wait(cx, result)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.wait(cx, result)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};
    use tokio::time::{Instant, advance};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn time_passes_only_while_a_write_makes_no_progress() -> io::Result<()> {
        let written = Arc::new(AtomicU64::new(0));
        let (ours, mut peer) = duplex(4);
        let mut stream = MustProgress::new(ours, Duration::from_secs(10), Arc::clone(&written));
        stream.write_all(b"1234").await?;
        // Nothing is pending.
        advance(Duration::from_secs(100)).await;
        let reader = tokio::spawn(async move {
            for _ in 0..3 {
                tokio::time::sleep(Duration::from_secs(9)).await;
                peer.read_u8().await?;
            }
            io::Result::Ok(peer)
        });
        let began = Instant::now();
        let slices = [IoSlice::new(b"567"), IoSlice::new(b"8")];
        assert_eq!(stream.write_vectored(&slices[..1]).await?, 1, "after 9 s");
        stream.write_all(b"67").await?;
        assert_eq!(began.elapsed().as_secs(), 27);
        let error = stream.write_vectored(&slices).await.expect_err("nobody reads");
        assert_eq!((error.kind(), began.elapsed().as_secs()), (io::ErrorKind::TimedOut, 37));
        assert_eq!(written.load(Ordering::Relaxed), 7);
        drop(reader.await?);
        Ok(())
    }
}
