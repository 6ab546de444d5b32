//! The one thread that owns the model. It loads and warms it and then repeats three verbs:
//! *admit* waiting pictures into free rows, *step* the pictures of one size by one evaluation,
//! *retire* one finished picture. Between two steps everything may change: pictures join, leave
//! and are given up when nobody waits for them.

use std::ops::Deref;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};
use std::{fmt, thread};

use anyhow::Context as _;
use sd_models::{Error, Size, Spec};
use tracing::{debug, error, info};

use super::batch::Rotation;
use super::job::{Drawn, Failure, Order};
use super::{Model, Phase, Shared, Trajectory};

/// Sizes that may be drawn at the same time, in full batches of each.
const MAX_BUCKETS: usize = 4;

/// Side of the picture that warms the model; small, since only the first touch matters.
const WARM_UP_SIDE: usize = 128;

/// The life of the model thread.
pub(super) fn main<M: Model>(shared: Arc<Shared>, load: impl FnOnce() -> anyhow::Result<M>) {
    let engine = Hold(shared);
    let started = Instant::now();
    let model = match load().and_then(|model| warm(&model).map(|()| model)) {
        Ok(model) => model,
        Err(error) => return engine.enter(Phase::Dead(format!("{error:#}"))),
    };
    let info = model.info().clone();
    info!(
        model = info.name,
        device = info.device,
        precision = info.precision,
        load_ms = millis(started.elapsed()),
        "ready"
    );
    engine.enter(Phase::Ready(Arc::new(info)));
    Worker::new(model, engine).run();
}

/// The thread's hold on the engine. However the thread ends, by a return or by a panic, the
/// phase says so and nobody is left in the queue.
struct Hold(Arc<Shared>);

impl Deref for Hold {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.0
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if thread::panicking() {
            self.enter(Phase::Dead("the model thread panicked".into()));
        }
        drop(self.queue().clear());
    }
}

/// Draws a small picture that nobody sees: the first one pays for lazy work in the device.
fn warm<M: Model>(model: &M) -> anyhow::Result<()> {
    let defaults = &model.info().defaults;
    let small = Size::new(
        WARM_UP_SIDE.min(defaults.size.width()),
        WARM_UP_SIDE.min(defaults.size.height()),
    );
    let spec = Spec {
        prompt: String::new(),
        negative_prompt: String::new(),
        size: small.unwrap_or(defaults.size),
        steps: 1,
        guidance_scale: defaults.guidance_scale,
        seed: 0,
        scheduler: defaults.scheduler,
    };
    let draw = || {
        let mut trajectory = model.begin(&spec)?;
        while !trajectory.done() {
            model.step(&mut [&mut trajectory])?;
        }
        model.decode(&trajectory)
    };
    draw().context("the model loads but does not draw").map(drop)
}

/// A picture in the making and whom it is for.
struct Slot<T> {
    order: Order,
    trajectory: T,
    begun: Instant,
}

struct Worker<M: Model> {
    /// Dropped first: the phase has changed before the pictures in the making are given up.
    engine: Hold,
    model: M,
    slots: Vec<Slot<M::Trajectory>>,
    rotation: Rotation,
    /// How long the last step took: the time that one admission round may take.
    last_step: Duration,
    /// Set by the failure after which nothing can be drawn.
    lost: bool,
}

impl<M: Model> Worker<M> {
    fn new(model: M, engine: Hold) -> Self {
        Self {
            engine,
            model,
            slots: Vec::new(),
            rotation: Rotation::default(),
            last_step: Duration::ZERO,
            lost: false,
        }
    }

    fn run(mut self) {
        while self.wait() {
            self.turn();
            if self.lost {
                return self.give_up();
            }
        }
    }

    /// Sleeps until there is something to draw; false when the engine has stopped.
    fn wait(&self) -> bool {
        let stopped = || matches!(*self.engine.phase.borrow(), Phase::Stopped);
        let mut queue = self.engine.queue();
        while self.slots.is_empty() && queue.is_empty() && !stopped() {
            queue = self.engine.arrived.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        !stopped()
    }

    /// One round of the loop.
    fn turn(&mut self) {
        self.slots.retain(|slot| slot.order.wanted());
        self.admit();
        self.step();
        self.retire();
    }

    /// Begins waiting pictures while there are rows for them. Text is encoded here, so a round
    /// ends early rather than keep the pictures in the making waiting for longer than a step.
    fn admit(&mut self) {
        let round = Instant::now();
        let busy = !self.slots.is_empty();
        while !self.lost {
            let Some(order) = self.next_order() else { return };
            match self.model.begin(&order.spec) {
                Ok(trajectory) => {
                    order.advance(0, trajectory.progress().1);
                    self.slots.push(Slot { order, trajectory, begun: Instant::now() });
                }
                Err(error) => order.settle(Err(self.failure(&error, "begin"))),
            }
            if busy && round.elapsed() > self.last_step {
                return;
            }
        }
    }

    /// The oldest picture for whose size there are rows. One that has to wait for rows holds
    /// back the younger ones of its size, so that two rows are found before one.
    fn next_order(&self) -> Option<Order> {
        let max_rows = self.engine.settings.max_batch_rows;
        let mut free: usize =
            (MAX_BUCKETS * max_rows).saturating_sub(self.slots.iter().map(rows).sum());
        let loads = self.loads();
        let mut held_back: Vec<Size> = Vec::new();
        self.engine.queue().next(|order| {
            let (size, rows) = (order.spec.size, order.spec.rows());
            let load = loads.iter().find(|load| load.0 == size).map_or(0, |load| load.1);
            let fits = rows <= free && (load == 0 || load + rows <= max_rows);
            if held_back.contains(&size) {
                return false;
            }
            if !fits {
                held_back.push(size);
                free = if rows > free { 0 } else { free };
            }
            fits
        })
    }

    /// Rows in the making for each size.
    fn loads(&self) -> Vec<(Size, usize)> {
        let mut loads: Vec<(Size, usize)> = Vec::new();
        for slot in self.slots.iter().filter(|slot| !slot.trajectory.done()) {
            let size = slot.trajectory.size();
            match loads.iter_mut().find(|load| load.0 == size) {
                Some(load) => load.1 += rows(slot),
                None => loads.push((size, rows(slot))),
            }
        }
        loads
    }

    /// One evaluation for every picture of the size whose turn it is.
    fn step(&mut self) {
        let Some(size) = self.rotation.next(&self.loads()) else { return };
        let mut members: Vec<_> = self
            .slots
            .iter_mut()
            .filter(|slot| slot.trajectory.size() == size && !slot.trajectory.done())
            .collect();
        let began = Instant::now();
        let mut batch: Vec<_> = members.iter_mut().map(|slot| &mut slot.trajectory).collect();
        let stepped = self.model.step(&mut batch);
        self.last_step = began.elapsed();
        match stepped {
            Ok(()) => members.iter().for_each(|slot| slot.order.advance(1, 0)),
            Err(error) => {
                let failure = self.failure(&error, "step");
                self.settle_size(size, &failure);
            }
        }
    }

    /// An evaluation that failed leaves its members in an unknown state: all of them end.
    fn settle_size(&mut self, size: Size, failure: &Failure) {
        let member = |slot: &mut Slot<M::Trajectory>| {
            slot.trajectory.size() == size && !slot.trajectory.done()
        };
        for slot in self.slots.extract_if(.., member) {
            slot.order.settle(Err(failure.clone()));
        }
    }

    /// Decodes one finished picture, if there is one; the next waits for a step of the others.
    fn retire(&mut self) {
        let Some(place) = self.slots.iter().position(|slot| slot.trajectory.done()) else { return };
        let Slot { order, trajectory, begun } = self.slots.remove(place);
        match self.model.decode(&trajectory) {
            Ok(rgb) => {
                let queued = begun.saturating_duration_since(order.submitted);
                let drawn = Drawn {
                    rgb,
                    warnings: trajectory.warnings().to_vec(),
                    queued,
                    drawn: begun.elapsed(),
                };
                debug!(
                    size = %order.spec.size,
                    steps = order.spec.steps,
                    queued_ms = millis(queued),
                    drawn_ms = millis(drawn.drawn),
                    "drew a picture"
                );
                order.settle(Ok(drawn));
            }
            Err(error) => order.settle(Err(self.failure(&error, "decode"))),
        }
    }

    /// What a client may know of an error. The error itself is logged here and nowhere else.
    fn failure(&mut self, error: &Error, stage: &'static str) -> Failure {
        match error {
            Error::Spec { field, reason } => Failure::Spec { field, reason: reason.clone() },
            Error::OutOfMemory(_) => {
                error!(stage, "{}", chain(error));
                Failure::OutOfMemory
            }
            Error::DeviceLost(_) => {
                error!(stage, "{}; nothing more can be drawn", chain(error));
                self.lost = true;
                Failure::DeviceLost
            }
            _ => {
                error!(stage, "{}", chain(error));
                Failure::Model
            }
        }
    }

    /// The device is gone: everyone hears of it, and the phase turns `/ping` red.
    fn give_up(self) {
        self.engine.enter(Phase::DeviceLost);
        let waiting = self.engine.queue().clear();
        let drawing = self.slots.into_iter().map(|slot| slot.order);
        for order in drawing.chain(waiting) {
            order.settle(Err(Failure::DeviceLost));
        }
    }
}

fn rows<T: Trajectory>(slot: &Slot<T>) -> usize {
    slot.trajectory.rows()
}

/// An error and its causes in one line.
fn chain(error: &Error) -> impl fmt::Display {
    fmt::from_fn(move |f| {
        write!(f, "{error}")?;
        let mut cause = std::error::Error::source(error);
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    })
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
