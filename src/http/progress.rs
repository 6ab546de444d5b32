//! A connection whose peer must take what is written to it.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

/// A stream that fails when its peer takes less than `rate` of what is written to it. Time passes
/// only while a write is pending; when all is written, the next write has all of its time.
#[derive(Debug)]
pub(crate) struct MustProgress<S> {
    stream: S,
    /// Time over which the rate is measured.
    window: Duration,
    /// Bytes per second, on average over a window.
    rate: u64,
    pending: Option<Pending>,
    /// Number of bytes written.
    written: Arc<AtomicU64>,
}

/// Writes that wait for the peer.
#[derive(Debug)]
struct Pending {
    /// The end of the window.
    end: Pin<Box<Sleep>>,
    /// Number of bytes written when it began.
    before: u64,
}

impl<S> MustProgress<S> {
    pub(crate) fn new(stream: S, window: Duration, rate: u64, written: Arc<AtomicU64>) -> Self {
        Self { stream, window, rate, pending: None, written }
    }

    fn wrote(
        &mut self,
        cx: &mut Context<'_>,
        result: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(written)) = &result {
            self.written.fetch_add(*written as u64, Ordering::Relaxed);
        }
        self.wait(cx, result)
    }

    /// Waits with a pending operation until the end of a window in which too little was written.
    fn wait<T>(
        &mut self,
        cx: &mut Context<'_>,
        result: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if result.is_ready() {
            return result;
        }
        let written = self.written.load(Ordering::Relaxed);
        let window = self.window;
        let begin = || Pending { end: Box::pin(sleep(window)), before: written };
        let pending = self.pending.get_or_insert_with(begin);
        loop {
            ready!(pending.end.as_mut().poll(cx));
            let taken = u128::from(written - pending.before);
            if taken == 0 || taken * 1000 < u128::from(self.rate) * window.as_millis() {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
            *pending = begin();
        }
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
        // It is called when nothing is left to write.
        let result = Pin::new(&mut self.stream).poll_flush(cx);
        if result.is_ready() {
            self.pending = None;
        }
        self.wait(cx, result)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.wait(cx, result)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
    use tokio::time::{Instant, advance};

    use super::*;

    const WINDOW: Duration = Duration::from_secs(10);

    /// A stream with 1 byte per second, and its peer, which has yet to take 4 bytes.
    async fn filled() -> io::Result<(MustProgress<DuplexStream>, DuplexStream)> {
        let (ours, peer) = duplex(4);
        let mut stream = MustProgress::new(ours, WINDOW, 1, Arc::default());
        stream.write_all(b"1234").await?;
        // Nothing is pending.
        advance(10 * WINDOW).await;
        Ok((stream, peer))
    }

    fn reads(mut peer: DuplexStream, every_s: u64) -> tokio::task::JoinHandle<io::Result<()>> {
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(Duration::from_secs(every_s)).await;
                let mut bytes = [0; 2];
                peer.read_exact(&mut bytes).await?;
            }
        })
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_takes_nothing_or_a_drop_at_a_time_is_refused() -> io::Result<()> {
        for every_s in [9, 1000] {
            let (mut stream, peer) = filled().await?;
            let (began, reader) = (Instant::now(), reads(peer, every_s));
            let error = stream.write_all(&[0; 100]).await.expect_err("too slow");
            assert_eq!((error.kind(), began.elapsed()), (io::ErrorKind::TimedOut, WINDOW));
            reader.abort();
        }
        Ok(())
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_of_the_rate_may_take_as_long_as_it_needs() -> io::Result<()> {
        let (mut stream, peer) = filled().await?;
        let (began, reader) = (Instant::now(), reads(peer, 1));
        let slices = [IoSlice::new(b"567"), IoSlice::new(b"8")];
        assert_eq!(stream.write_vectored(&slices).await?, 2, "after 1 s");
        stream.write_all(&[0; 98]).await?;
        stream.flush().await?;
        assert_eq!(began.elapsed().as_secs(), 50);
        assert_eq!(stream.written.load(Ordering::Relaxed), 104);
        reader.abort();
        // The next response has a window of its own.
        advance(10 * WINDOW).await;
        let began = Instant::now();
        assert!(stream.write_all(&[0; 100]).await.is_err());
        assert!(began.elapsed() <= WINDOW);
        Ok(())
    }
}
