//! The bounds and the durability of the store.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::http::{HeaderValue, StatusCode};

use super::disk::{Disk, Space};
use super::*;
use crate::engine::Priority;

const LIMITS: JobLimits =
    JobLimits { jobs: 4, jobs_per_client: 3, bytes: 1 << 20, retention: Duration::from_secs(60) };

fn job(id: &str, client: &str, bytes: usize) -> NewJob {
    let request = StoredRequest { body: vec![7; bytes].into(), ..StoredRequest::default() };
    NewJob {
        id: id.into(),
        client: Client::named(client),
        timeout: Duration::from_secs(60),
        priority: Priority::High,
        seed: u64::MAX,
        model: "fake".into(),
        fingerprint: "f".into(),
        webhook: None,
        request,
    }
}

fn done(bytes: usize) -> Response<Bytes> {
    let mut response = Response::new(vec![9; bytes].into());
    response.headers_mut().insert("x-text", HeaderValue::from_bytes(b"caf\xe9: a").expect("ok"));
    response
}

impl JobStore {
    /// A store with so many jobs of a client, for tests of their ends. What its thread is asked for
    /// is counted.
    pub(crate) async fn with_jobs(
        dir: &Path,
        jobs: usize,
        asked: Arc<AtomicUsize>,
    ) -> Result<(Self, Vec<UnfinishedJob>)> {
        let space = move || {
            asked.fetch_add(1, Ordering::Relaxed);
            None
        };
        let database = Database::on(dir, Disk::new(space)).expect("a database");
        let limits = JobLimits { jobs, jobs_per_client: jobs, ..LIMITS };
        let store = Self { database, ..Self::open(None, limits).expect("a store") };
        for number in 0..jobs {
            let long = Duration::from_secs(3600);
            let job = NewJob { timeout: long, ..job(&number.to_string(), "x", 0) };
            store.insert(job, 1).await?;
        }
        let unfinished = store.unfinished().await?;
        Ok((store, unfinished))
    }

    /// Whether everything that is asked for fails, as on a disk that was taken away.
    pub(crate) async fn set_read_only(&self, is_read_only: bool) {
        self.database.set_read_only(is_read_only).await;
    }
}

async fn finished(store: &JobStore, id: &str, client: &str, bytes: usize) -> Result<()> {
    store.insert(job(id, client, 0), 1).await?;
    store.finish(id, done(bytes)).await.map(drop)
}

#[tokio::test]
async fn jobs_and_results_survive_the_process_unchanged() -> Result<()> {
    let dir = tempfile::tempdir().expect("a directory");
    let open = || JobStore::open(Some(dir.path()), LIMITS).expect("a store");
    let store = open();
    let (accepted, _) = store.insert(job("a", "x", 3), 1).await?;
    finished(&store, "b", "x", 5).await?;
    store.set_begun("a", 1).await?;
    drop(store);
    let store = open();
    let unfinished = store.unfinished().await?;
    let [again] = &unfinished[..] else { panic!("{unfinished:?}") };
    assert_eq!((again.seq, &again.client), (accepted.seq, &accepted.client));
    assert_eq!((again.seed, again.priority, again.begun), (u64::MAX, Priority::High, 1));
    assert_eq!((&*again.model, &*again.fingerprint), ("fake", "f"));
    assert!(again.left <= accepted.left && again.left > Duration::from_secs(1));
    assert_eq!(store.request("a").await?.body, [7, 7, 7][..]);
    let result = store.result("b").await?.expect("a result");
    assert_eq!((result.headers(), result.body()), (done(5).headers(), done(5).body()));
    // It has one end, whatever comes later.
    assert!(store.finish("a", done(1)).await?.is_some());
    assert!(store.finish("a", done(2)).await?.is_none());
    assert_eq!(store.result("a").await?.expect("a result").body(), &[9][..]);
    assert_eq!(store.remove("a").await?, Some(RemovedJob::Ended));
    assert_eq!(store.remove("a").await?, None);
    store.finish("a", done(2)).await?;
    assert!(store.get("a").await.is_err());
    Ok(())
}

#[tokio::test]
async fn a_client_loses_its_own_results_first_and_none_that_another_waits_for() -> Result<()> {
    let store = JobStore::open(None, LIMITS).expect("a store");
    let names = async || -> Result<Vec<String>> {
        let mut names = Vec::new();
        for client in ["x", "y"] {
            let jobs = store.list(&Client::named(client), None).await?;
            names.extend(jobs.into_iter().map(|job| job.id));
        }
        names.sort();
        Ok(names)
    };
    for (id, client) in [("a", "x"), ("b", "y"), ("c", "x"), ("d", "x"), ("e", "x")] {
        finished(&store, id, client, 1).await?;
    }
    assert_eq!(names().await?, ["b", "c", "d", "e"], "x may have three");
    store.insert(job("f", "y", 0), 7).await?;
    assert_eq!(names().await?, ["c", "d", "e", "f"], "the own result, though it was waited for");
    let refusal = store.insert(job("g", "y", 0), 7).await.expect_err("no room");
    let ApiError::JobLimit { limit: "--max-jobs", retry_after_s: 7 } = refusal else {
        panic!("{refusal:?}");
    };
    assert_eq!(names().await?, ["c", "d", "e", "f"], "a refused job deletes nothing");
    store.result("d").await?;
    store.insert(job("g", "y", 0), 7).await?;
    assert_eq!(names().await?, ["c", "e", "f", "g"], "a received result makes room");
    Ok(())
}

#[tokio::test]
async fn results_are_weighed() -> Result<()> {
    let store = JobStore::open(None, LIMITS).expect("a store");
    let half = LIMITS.bytes_per_client();
    finished(&store, "a", "x", half).await?;
    finished(&store, "b", "y", half).await?;
    finished(&store, "c", "x", half).await?;
    assert!(store.get("a").await.is_err(), "the client's own makes room");
    store.insert(job("d", "z", 0), 1).await?;
    let refusal = store.finish("d", done(1)).await.expect_err("no room");
    assert_eq!(refusal.status(), StatusCode::INSUFFICIENT_STORAGE);
    assert!(refusal.to_string().contains("--max-job-bytes"), "{refusal}");
    let refusal = store.insert(job("e", "z", half + 1), 1).await.expect_err("too large");
    assert_eq!(refusal.status(), StatusCode::PAYLOAD_TOO_LARGE);
    Ok(())
}

#[tokio::test]
async fn a_full_disk_is_507_and_nothing_is_half_written() -> Result<()> {
    let dir = tempfile::tempdir().expect("a directory");
    let store = JobStore::open(Some(dir.path()), LIMITS).expect("a store");
    finished(&store, "a", "x", 10).await?;
    store.insert(job("b", "x", 10), 1).await?;
    let full = |transaction: &rusqlite::Transaction<'_>| {
        let pages: i64 = transaction.query_row("PRAGMA max_page_count = 1", [], |r| r.get(0))?;
        assert!(pages > 1, "as many as there are");
        Ok(())
    };
    store.database.call(full).await?;
    let refusal = store.insert(job("c", "y", 100_000), 1).await.expect_err("full");
    assert_eq!(refusal.status(), StatusCode::INSUFFICIENT_STORAGE);
    assert!(refusal.to_string().contains("its disk is full"), "{refusal}");
    let refusal = store.finish("b", done(100_000)).await.expect_err("full");
    assert_eq!(refusal.status(), StatusCode::INSUFFICIENT_STORAGE);
    assert_eq!(store.count().await?, [1, 1]);
    assert_eq!(store.request("b").await?.body, vec![7; 10]);
    assert_eq!(store.result("a").await?.expect("a result").body(), done(10).body());
    Ok(())
}

#[tokio::test]
async fn a_disk_that_jobs_have_filled_has_room_to_delete_them_and_is_given_back() -> Result<()> {
    const VOLUME: u64 = 3 << 20;
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().to_owned();
    let used = move || -> u64 {
        let files = std::fs::read_dir(&path).expect("a directory").flatten();
        files.filter_map(|file| Some(file.metadata().ok()?.len())).sum()
    };
    let limits = JobLimits { jobs: 1000, jobs_per_client: 1000, bytes: 1 << 30, ..LIMITS };
    let open = || {
        let used = used.clone();
        let space = move || Some(Space { free: VOLUME.saturating_sub(used()), total: VOLUME });
        let database = Database::on(dir.path(), Disk::new(space)).expect("a database");
        JobStore { database, ..JobStore::open(None, limits).expect("a store") }
    };
    let mut store = open();
    for round in 0..2 {
        // Small and large ones; the last are too large for what is left.
        let mut ids = Vec::new();
        let refusal = loop {
            let id = format!("{round} {}", ids.len());
            if let Err(refusal) = store.insert(job(&id, "x", 40_000), 1).await {
                break refusal;
            }
            if let Err(refusal) = store.finish(&id, done(40_000 + ids.len() % 2 * 200_000)).await {
                assert_eq!(refusal.status(), StatusCode::INSUFFICIENT_STORAGE);
                let mut error = done(100);
                *error.status_mut() = refusal.status();
                store.finish(&id, error).await?;
            }
            ids.push(id);
            assert!(used() <= VOLUME, "{} bytes", used());
        };
        assert!(refusal.to_string().contains("its disk is full"), "{refusal}");
        assert!(used() > VOLUME / 2, "{} bytes", used());
        if round == 0 {
            drop(store);
            store = open();
        }
        for id in ids {
            assert!(store.remove(&id).await?.is_some());
            assert!(used() <= VOLUME, "{} bytes", used());
        }
        // A file system in use is not full of what was deleted.
        finished(&store, "large", "x", 700_000).await?;
        assert!(store.remove("large").await?.is_some());
    }
    Ok(())
}

#[tokio::test]
async fn a_job_has_failed_at_its_deadline_whatever_can_be_stored() -> Result<()> {
    let store = JobStore::open(None, LIMITS).expect("a store");
    let late = NewJob { timeout: Duration::ZERO, ..job("a", "x", 0) };
    store.insert(late, 1).await?;
    assert_eq!(store.get("a").await?.end, Some(JobEnd::Late));
    let refusal = store.finish("a", done(1)).await.expect_err("told to have failed");
    assert_eq!(refusal.status(), StatusCode::GATEWAY_TIMEOUT);
    assert!(store.result("a").await?.is_none());
    let mut error = done(1);
    *error.status_mut() = refusal.status();
    assert!(store.finish("a", error).await?.is_some());
    assert_eq!(store.get("a").await?.end, Some(JobEnd::Failed(vec![9])));
    Ok(())
}

#[tokio::test]
async fn pages_of_a_list_follow_each_other_also_after_a_job_that_is_gone() -> Result<()> {
    let store = JobStore::open(None, JobLimits { jobs_per_client: 4, ..LIMITS }).expect("a store");
    for id in ["a", "b", "c", "d"] {
        store.insert(job(id, "x", 0), 1).await?;
    }
    let client = Client::named("x");
    let all = store.list(&client, None).await?;
    let ids = |jobs: &[JobRecord]| jobs.iter().map(|job| job.id.clone()).collect::<Vec<_>>();
    assert_eq!(ids(&all), ["d", "c", "b", "a"]);
    let place: Cursor = Cursor::after(&all[1]).to_string().parse().expect("a cursor");
    assert_eq!(ids(&store.list(&client, Some(place.clone())).await?), ["b", "a"]);
    store.remove("c").await?;
    assert!(ids(&store.list(&client, Some(place)).await?).ends_with(&["b".into(), "a".into()]));
    Ok(())
}

#[tokio::test]
async fn jobs_wait_by_client_priority_and_age() {
    let turns = Turns::default();
    let x = Client::named("x");
    let first = turns.wait(&x, Priority::Low, 1).await;
    let _other = turns.wait(&Client::named("y"), Priority::Low, 9).await;
    let order = Mutex::new(Vec::new());
    let later = async |priority, seq| {
        let _turn = turns.wait(&x, priority, seq).await;
        order.lock().expect("unpoisoned").push(seq);
    };
    let release = async { drop(first) };
    tokio::join!(
        later(Priority::Low, 4),
        later(Priority::Low, 3),
        later(Priority::Low, 2),
        release
    );
    assert_eq!(*order.lock().expect("unpoisoned"), [2, 3, 4]);
    let low = turns.wait(&x, Priority::Low, 5).await;
    drop(turns.wait(&x, Priority::High, 6).await);
    drop(low);
}

#[tokio::test]
async fn clients_that_receive_one_result_share_its_memory() -> Result<()> {
    let store = JobStore::open(None, LIMITS).expect("a store");
    finished(&store, "a", "x", 1000).await?;
    finished(&store, "b", "x", 1000).await?;
    let body = async |id: &str| -> Result<Bytes> {
        Ok(store.result(id).await?.expect("a result").into_body())
    };
    let (first, second, other) = (body("a").await?, body("a").await?, body("b").await?);
    assert_eq!(first.as_ptr(), second.as_ptr());
    assert_ne!(first.as_ptr(), other.as_ptr());
    assert_eq!((&first, &other), (&done(1000).into_body(), &done(1000).into_body()));
    Ok(())
}
