//! What the clients saw: jobs that were accepted, pictures by what they were asked with, answers by
//! status, and everything that was wrong.

use std::collections::{BTreeMap, HashMap};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rand::Rng as _;
use reqwest::blocking::Client;
use serde_json::Value;

use crate::Dice;
use crate::wire::{self, Answer};

/// The priorities of jobs.
pub(crate) const PRIORITIES: [&str; 3] = ["low", "normal", "high"];

/// An accepted job.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    pub(crate) key: &'static str,
    seed: u64,
    priority: &'static str,
    has_webhook: bool,
    /// It was cancelled by its client.
    deleted: bool,
    /// Its end, once seen: it must stay the same.
    end: Option<String>,
}

impl Job {
    pub(crate) fn new(
        key: &'static str,
        seed: u64,
        priority: &'static str,
        has_webhook: bool,
    ) -> Self {
        Self { key, seed, priority, has_webhook, deleted: false, end: None }
    }
}

#[derive(Debug, Default)]
pub(crate) struct Book {
    pub(crate) jobs: BTreeMap<String, Job>,
    /// What webhooks told: how often, and which end. One may come before the 202 of its job.
    told: HashMap<String, (u64, String)>,
    pub(crate) answers: BTreeMap<u16, u64>,
    /// Requests without an answer, while the server was being ended or the client had misbehaved.
    pub(crate) unanswered: u64,
    pub(crate) pictures: u64,
    /// The hash of the pixels by what was asked for.
    pixels: HashMap<String, u64>,
    wrong: BTreeMap<String, u64>,
}

#[derive(Debug, Default)]
pub(crate) struct Ledger(Mutex<Book>);

impl Ledger {
    pub(crate) fn book(&self) -> MutexGuard<'_, Book> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that something was wrong.
    pub(crate) fn wrong(&self, sentence: impl Into<String>) {
        *self.book().wrong.entry(sentence.into()).or_default() += 1;
    }

    pub(crate) fn sentences(&self) -> Vec<String> {
        let book = self.book();
        book.wrong.iter().map(|(sentence, count)| format!("{count} x {sentence}")).collect()
    }

    /// Counts an answer and checks it.
    pub(crate) fn note(&self, what: &str, answer: &Answer) {
        *self.book().answers.entry(answer.status).or_default() += 1;
        if let Some(fault) = answer.fault() {
            self.wrong(format!("{what}: {fault}"));
        }
    }

    /// A picture that was asked for with `what`: the same request has the same picture, in every
    /// process and beside any other.
    pub(crate) fn picture(&self, what: &str, file: &[u8]) {
        let Ok(image) = image::load_from_memory(file) else {
            return self.wrong(format!("{what}: the picture does not decode"));
        };
        let mut hasher = DefaultHasher::new();
        image.to_rgb8().into_raw().hash(&mut hasher);
        let hash = hasher.finish();
        let mut book = self.book();
        book.pictures += 1;
        if *book.pixels.entry(what.to_owned()).or_insert(hash) != hash {
            drop(book);
            self.wrong(format!("{what}: two different pictures"));
        }
    }

    pub(crate) fn accepted(&self, id: &str, job: Job) {
        if self.book().jobs.insert(id.to_owned(), job).is_some() {
            self.wrong(format!("the job ID {id} was given twice"));
        }
    }

    /// A job that has been accepted and not been deleted.
    pub(crate) fn any_job(&self, dice: &mut Dice) -> Option<(String, Job)> {
        let book = self.book();
        let count = book.jobs.len();
        let (id, job) = book.jobs.iter().nth(dice.random_range(0..count.max(1)))?;
        (!job.deleted).then(|| (id.clone(), job.clone()))
    }

    /// From now on the job may be gone.
    pub(crate) fn delete(&self, id: &str) {
        if let Some(job) = self.book().jobs.get_mut(id) {
            job.deleted = true;
        }
    }

    fn is_deleted(&self, id: &str) -> bool {
        self.book().jobs.get(id).is_none_or(|job| job.deleted)
    }

    /// Looks at a job; whether it has ended. An end that was seen must be seen again.
    pub(crate) fn look(&self, client: &Client, url: &str, id: &str, job: &Job) -> Option<bool> {
        let get = |path: &str| {
            let request = client.get(format!("{url}/v1/jobs/{id}{path}")).bearer_auth(job.key);
            wire::send(request).filter(|answer| ![429, 503].contains(&answer.status))
        };
        let answer = get("")?;
        self.note("GET /v1/jobs/{id}", &answer);
        // A look that crosses the client's own DELETE proves nothing.
        if self.is_deleted(id) {
            return Some(true);
        }
        let state = answer.json();
        let end = match state["state"].as_str() {
            Some("queued" | "running") if job.end.is_some() => {
                self.wrong("a job that had ended runs again");
                return Some(false);
            }
            Some("queued" | "running") => return Some(false),
            Some("completed") => {
                let result = get("/result")?;
                self.note("GET /v1/jobs/{id}/result", &result);
                if !self.is_deleted(id) {
                    self.result(&result, job.seed);
                }
                "completed".to_owned()
            }
            Some("failed") => {
                let reason = get("/result")?;
                let reason = end_of(&reason.json(), "failed");
                if reason.is_none() && !self.is_deleted(id) {
                    self.wrong("a job failed without a reason");
                }
                reason.unwrap_or_else(|| "failed".into())
            }
            _ => {
                self.wrong(format!("an accepted job is answered with {}", answer.status));
                "lost".to_owned()
            }
        };
        let mut book = self.book();
        if book.jobs.get(id)?.priority != state["priority"] {
            *book.wrong.entry("a job has another priority".into()).or_default() += 1;
        }
        let before = book.jobs.get_mut(id)?.end.replace(end.clone());
        drop(book);
        if before.is_some_and(|before| before != end) {
            self.wrong("a job ended in two ways");
        }
        Some(true)
    }

    /// A webhook: it tells an end, which is the one that was seen and that all others tell.
    pub(crate) fn told(&self, state: &Value) {
        let end = state["state"].as_str().and_then(|name| end_of(state, name));
        let (Some(id), Some(end)) = (state["id"].as_str(), end) else {
            return self.wrong(format!("a webhook that tells no end: {state}"));
        };
        let mut book = self.book();
        let (count, told) = book.told.entry(id.to_owned()).or_insert_with(|| (0, end.clone()));
        *count += 1;
        let agrees = *told == end;
        drop(book);
        if !agrees {
            self.wrong("two webhooks tell two ends of one job");
        }
    }

    /// The number of jobs that have ended and whose webhook has not come.
    pub(crate) fn untold(&self) -> usize {
        let book = self.book();
        let waits = |(id, job): &(&String, &Job)| {
            job.has_webhook && !job.deleted && job.end.is_some() && !book.told.contains_key(*id)
        };
        book.jobs.iter().filter(waits).count()
    }

    /// Compares what webhooks told with the ends that were seen, and says how many came.
    pub(crate) fn webhooks(&self) -> String {
        let book = self.book();
        let mut wrong = Vec::new();
        for (id, (_, told)) in &book.told {
            let job = book.jobs.get(id);
            // A job whose 202 was cut off is not in the book.
            let end = job.and_then(|job| job.end.as_ref());
            if end.is_some_and(|end| end != told) {
                wrong.push("a webhook tells another end than the job");
            }
            if job.is_some_and(|job| !job.has_webhook) {
                wrong.push("a webhook of a job that has none");
            }
        }
        let asked = book.jobs.values().filter(|job| job.has_webhook).count();
        let counts = || book.told.values().map(|(count, _)| *count);
        let (told, again) = (counts().count(), counts().filter(|count| *count > 1).count());
        let figures = format!(
            "{asked} jobs with a webhook; {told} told of, {again} of them more than once, by {} calls",
            counts().sum::<u64>()
        );
        drop(book);
        for sentence in wrong {
            self.wrong(sentence);
        }
        figures
    }

    /// The number of completed jobs by priority: some of each.
    pub(crate) fn priorities(&self) -> BTreeMap<&'static str, u64> {
        let mut completed = BTreeMap::from(PRIORITIES.map(|priority| (priority, 0)));
        let is_completed = |job: &&Job| !job.deleted && job.end.as_deref() == Some("completed");
        for job in self.book().jobs.values().filter(is_completed) {
            *completed.entry(job.priority).or_default() += 1;
        }
        for (priority, _) in completed.iter().filter(|(_, count)| **count == 0) {
            self.wrong(format!("no job of the priority {priority} was completed"));
        }
        completed
    }

    /// The result of a job.
    fn result(&self, result: &Answer, seed: u64) {
        let data = result.json()["data"].as_str().map(decode).unwrap_or_default();
        if result.status == 200 {
            self.picture(&format!("plain seed {seed}"), &data);
        } else {
            self.wrong(format!("the result of a completed job is answered with {}", result.status));
        }
    }

    /// Pages through the jobs of a key: each that was accepted and not deleted is listed once.
    pub(crate) fn list(&self, client: &Client, url: &str, key: &str) {
        let (mut listed, mut cursor) = (BTreeMap::<String, u64>::new(), String::new());
        for _ in 0..10_000 {
            let request = client.get(format!("{url}/v1/jobs?limit=50{cursor}")).bearer_auth(key);
            let Some(answer) = wire::send(request).filter(|answer| answer.status == 200) else {
                return self.wrong("GET /v1/jobs does not list the jobs");
            };
            self.note("GET /v1/jobs", &answer);
            let page = answer.json();
            for id in page["jobs"].as_array().into_iter().flatten() {
                *listed.entry(id["id"].as_str().unwrap_or_default().into()).or_default() += 1;
            }
            match page["next"].as_str() {
                Some(next) => cursor = format!("&cursor={next}"),
                None => break,
            }
        }
        let jobs = self.book().jobs.clone();
        for (id, job) in jobs.iter().filter(|(_, job)| job.key == key && !job.deleted) {
            match listed.get(id) {
                Some(1) => {}
                count => self.wrong(format!("a job of {:?} is listed {count:?} times", job.end)),
            }
        }
    }

    /// The number of jobs by their ends, and the jobs without one.
    pub(crate) fn ends(&self) -> (BTreeMap<String, u64>, Vec<(String, Job)>) {
        let (mut ends, mut open) = (BTreeMap::new(), Vec::new());
        for (id, job) in &self.book().jobs {
            match (&job.end, job.deleted) {
                (_, true) => *ends.entry("deleted by its client".to_owned()).or_default() += 1,
                (Some(end), _) => *ends.entry(end.clone()).or_default() += 1,
                (None, _) => open.push((id.clone(), job.clone())),
            }
        }
        (ends, open)
    }
}

/// The end that a state or an error tells: `completed`, or `failed` with its reason.
fn end_of(told: &Value, state: &str) -> Option<String> {
    match (state, told["error"]["code"].as_str()) {
        ("completed", None) => Some("completed".into()),
        ("failed", Some(reason)) => Some(format!("failed: {reason}")),
        _ => None,
    }
}

/// Base64, as JSON answers have it; empty if it is none.
pub(crate) fn decode(text: &str) -> Vec<u8> {
    use base64::Engine as _;
    base64::prelude::BASE64_STANDARD.decode(text).unwrap_or_default()
}

/// The pictures of a JSON answer of any API, each with its seed.
pub(crate) fn pictures(value: &Value) -> Vec<Vec<u8>> {
    let native = value["data"].as_str().into_iter();
    let openai = value["data"].as_array().into_iter().flatten();
    let a1111 = value["images"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let openai = openai.filter_map(|item| item["b64_json"].as_str());
    native.chain(openai).chain(a1111).map(decode).collect()
}
