//! Where bodies are parsed and input images decoded: on blocking threads, as many at a time as
//! there are CPU cores. Decoded images are weighed, since they take many times the memory of their
//! files, and what reading has taken is returned to the system. Directories that requests name files
//! of are looked at on threads of their own, since they may be on a slow file system. The request
//! waits for threads, memory and the work until its deadline; work that has begun ends, and is
//! counted until then.

use std::sync::Arc;
use std::thread;

use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::deadline::Deadline;
use super::error::Result;
use crate::host::freed::FreedMemory;
use crate::request::ValidationError;

/// A shorter body is parsed on the async thread that has received it, in less than a millisecond.
const SHORT_BODY_BYTES: usize = 32 << 10;

/// Maximum number of threads that look at directories.
const MAX_LOOKUPS: usize = 4;

/// The unit in which decoded images are weighed, in bytes: permits are counted in 32 bits.
const UNIT_BYTES: usize = 1 << 10;

/// The blocking threads for reading, and the memory for decoded images.
#[derive(Debug, Clone)]
pub(crate) struct Reader {
    threads: Arc<Semaphore>,
    lookups: Arc<Semaphore>,
    pixels: Arc<Semaphore>,
    /// All units of `pixels`.
    units: usize,
    freed: FreedMemory,
}

/// Memory that is reserved for the decoded images of a request.
#[derive(Debug)]
pub(crate) struct Weighed {
    bytes: usize,
    freed: FreedMemory,
    _permit: Option<OwnedSemaphorePermit>,
}

impl Drop for Weighed {
    fn drop(&mut self) {
        self.freed.add(self.bytes);
    }
}

impl Reader {
    /// A reader whose decoded images take at most so many bytes together.
    pub(crate) fn new(max_decoded_bytes: usize, freed: FreedMemory) -> Self {
        let threads = thread::available_parallelism().map_or(1, usize::from);
        let units = (max_decoded_bytes / UNIT_BYTES).clamp(1, u32::MAX as usize);
        let units = units.min(Semaphore::MAX_PERMITS);
        let [threads, lookups, pixels] =
            [threads, MAX_LOOKUPS, units].map(|permits| Arc::new(Semaphore::new(permits)));
        Self { threads, lookups, pixels, units, freed }
    }

    /// Runs `work` on a blocking thread. What it holds is held until it has ended, whether or not
    /// the client waits for it. Waits until `deadline`, else fails with [`ApiError::Deadline`](super::error::ApiError).
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        deadline: Deadline,
        held: impl Send + 'static,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        run(&self.threads, deadline, held, work).await
    }

    /// Runs `work`, which looks at directories, on a blocking thread, as [`Self::run`] does.
    pub(crate) async fn look_up<T: Send + 'static>(
        &self,
        deadline: Deadline,
        held: impl Send + 'static,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        run(&self.lookups, deadline, held, work).await
    }

    /// Parses a body, as [`Self::run`] does if it is long.
    pub(crate) async fn parse<T: Send + 'static>(
        &self,
        deadline: Deadline,
        held: impl Send + 'static,
        body: impl AsRef<[u8]> + Send + 'static,
        parse: impl FnOnce(&[u8]) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        if body.as_ref().len() <= SHORT_BODY_BYTES {
            return parse(body.as_ref());
        }
        self.run(deadline, held, move || parse(body.as_ref())).await
    }

    /// Waits until there is memory for decoded images of so many bytes, or fails at the deadline.
    /// Images that alone take more than all of it are decoded alone. Only for work of
    /// [`Self::run`], which holds nothing that others wait for while they have memory.
    pub(crate) fn weigh(&self, deadline: Deadline, bytes: usize) -> Result<Weighed> {
        let units = bytes.div_ceil(UNIT_BYTES).min(self.units) as u32;
        let acquire = Arc::clone(&self.pixels).acquire_many_owned(units);
        let permit = Handle::current().block_on(deadline.wait(acquire))?;
        // The semaphore is never closed.
        Ok(Weighed { bytes, freed: self.freed.clone(), _permit: permit.ok() })
    }
}

/// Runs `work` on a blocking thread, with one of these permits.
async fn run<T: Send + 'static>(
    threads: &Arc<Semaphore>,
    deadline: Deadline,
    held: impl Send + 'static,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let run = async {
        let thread = Arc::clone(threads).acquire_owned().await;
        let work = move || {
            // What the work owns is freed before this.
            let _held = (thread, held);
            work()
        };
        tokio::task::spawn_blocking(work).await
    };
    let ended = deadline.wait(run).await?;
    // A parser or decoder that panics was given a malicious body.
    ended.map_err(|_| ValidationError::body("the request cannot be read"))?
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use aide::axum::ApiRouter;
    use axum::Router;
    use axum::body::Body;
    use axum::http::Request;
    use clap::{Args as _, Command, FromArgMatches as _};
    use tokio::time::Instant;
    use tower::ServiceExt as _;

    use super::*;
    use crate::engine::{DeviceScheduler, Engine, EngineConfig, Safety};
    use crate::http::error::ApiError;
    use crate::http::slots::Amount;
    use crate::http::state::{AppState, HttpConfig};
    use crate::http::{a1111, invocations, openai};

    fn reader(max_decoded_bytes: usize) -> Reader {
        Reader::new(max_decoded_bytes, FreedMemory::default())
    }

    fn after(millis: u64) -> Deadline {
        Deadline { at: Instant::now() + Duration::from_millis(millis), limit: "--limit" }
    }

    fn is_late<T>(result: &Result<T>) -> bool {
        matches!(result, Err(ApiError::Deadline("--limit")))
    }

    #[tokio::test]
    async fn images_wait_for_the_memory_of_others_and_too_large_ones_for_all() {
        let reader = reader(10 << 20);
        let weigh = |millis, bytes| {
            let reader = reader.clone();
            let weigh = move || reader.weigh(after(millis), bytes);
            async move { tokio::task::spawn_blocking(weigh).await.expect("no panic") }
        };
        let first = weigh(60_000, 4 << 20).await.expect("memory");
        let second = weigh(60_000, 6 << 20).await.expect("memory");
        assert!(is_late(&weigh(50, usize::MAX).await));
        drop(first);
        assert!(is_late(&weigh(50, usize::MAX).await));
        drop(second);
        assert_eq!(weigh(60_000, usize::MAX).await.expect("memory").bytes, usize::MAX);
        assert_eq!(reader.pixels.available_permits(), 10 << 10);
    }

    #[tokio::test]
    async fn what_a_body_held_is_free_when_its_work_has_ended_and_not_before() {
        let (reader, held) = (reader(1), Arc::new(()));
        let threads = reader.threads.available_permits();
        let (go, wait) = mpsc::channel::<()>();
        let parse = move |body: &[u8]| {
            let _ = wait.recv();
            Ok(body.len())
        };
        let body = vec![0; SHORT_BODY_BYTES + 1];
        // The client is answered, or leaves, while its body is parsed.
        assert!(is_late(&reader.parse(after(50), Arc::clone(&held), body, parse).await));
        assert_eq!(
            (Arc::strong_count(&held), reader.threads.available_permits()),
            (2, threads - 1)
        );
        drop(go);
        while Arc::strong_count(&held) > 1 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(reader.threads.available_permits(), threads);
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_gets_no_thread_leaves_at_its_deadline() {
        let (reader, held) = (reader(1), Arc::new(()));
        let all = [&reader.threads, &reader.lookups];
        let all = all.map(|threads| threads.try_acquire_many(threads.available_permits() as u32));
        let began = Instant::now();
        assert!(is_late(&reader.run(after(100), Arc::clone(&held), || Ok(())).await));
        assert!(is_late(&reader.look_up(after(100), Arc::clone(&held), || Ok(())).await));
        assert!(began.elapsed() < Duration::from_millis(300), "{:?}", began.elapsed());
        assert_eq!(Arc::strong_count(&held), 1);
        drop(all);
        assert!(reader.run(after(100), held, || Ok(())).await.is_ok());
    }

    #[tokio::test]
    async fn every_api_answers_at_the_deadline_while_all_threads_are_taken() {
        let settings = HttpConfig::augment_args(Command::new("test")).get_matches_from(["test"]);
        let settings = HttpConfig::from_arg_matches(&settings).expect("defaults");
        let engine = EngineConfig {
            unload_after: None,
            max_queue: 1,
            max_batch_rows: 2,
            memory_budget_bytes: None,
            vae_tiling: false,
            safety: Safety::Blur,
        };
        let engine = Engine::absent(&DeviceScheduler::default(), engine);
        let jobs = settings.open_jobs().expect("jobs in memory");
        let state = AppState::new(engine.into(), settings, jobs);
        let threads = Arc::clone(&state.reader.threads);
        let _taken = threads.try_acquire_many(threads.available_permits() as u32);
        let slots = Arc::clone(&state.slots);
        let routes = ApiRouter::new()
            .merge(invocations::sagemaker_routes(false))
            .merge(invocations::routes())
            .merge(openai::routes())
            .merge(a1111::routes());
        let router: Router = routes.with_state(state).into();
        let json = format!(r#"{{"prompt":"a cat","image":"{}"}}"#, "A".repeat(SHORT_BODY_BYTES));
        for (path, content_type) in [
            ("/invocations", "application/json"),
            ("/v1/jobs", "application/json"),
            ("/v1/images/generations", "application/json"),
            ("/v1/images/edits", "multipart/form-data; boundary=x"),
            ("/sdapi/v1/txt2img", "application/json"),
            ("/sdapi/v1/img2img", "application/json"),
            ("/sdapi/v1/png-info", "application/json"),
            ("/sdapi/v1/options", "application/json"),
        ] {
            let request = Request::post(path)
                .header("content-type", content_type)
                .header("x-request-timeout-ms", "50")
                .body(Body::from(json.clone()))
                .expect("a request");
            let reply = router.clone().oneshot(request).await.expect("a reply");
            assert_eq!(reply.status(), 504, "{path}");
        }
        assert_eq!(slots.held(), Amount::default());
    }
}
