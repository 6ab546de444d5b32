//! Images that wait for their LoRAs.

use super::*;

/// An image that needs a file.
fn adapted(seed: u64, steps: usize) -> Spec {
    Spec { loras: vec![LoraUse::new("style", 1.0)], ..spec(seed, steps) }
}

#[test]
fn other_images_step_while_a_file_is_read() {
    let mut test = TestWorker::new(4, 8);
    let file = test.file();
    let _running = test.submit(1, vec![spec(1, 3)]);
    let ticket = test.submit(2, vec![adapted(2, 1)]);
    assert_eq!(stepped(&test.turn()), [1]);
    let _later = test.submit(3, vec![spec(3, 1)]);
    assert_eq!(stepped(&test.turn()), [1, 3], "a later image overtakes it");
    while !test.idle() {
        assert!(!test.turn().contains(&Call::Begin(2)));
    }
    // New images are still accepted.
    let _last = test.submit(4, vec![spec(4, 1)]);
    assert_eq!(test.worker.wait(), Next::Turn);
    assert_eq!(stepped(&test.turn()), [4]);
    test.engine.drain();
    drop(file);
    assert_eq!(test.worker.wait(), Next::Turn, "until the file has been read");
    let calls = test.turn();
    assert!(calls.contains(&Call::Begin(2)) && stepped(&calls) == [2], "{calls:?}");
    assert!(ticket.wait().now_or_never().expect("settled").is_ok());
    assert_eq!(test.worker.wait(), Next::End, "nothing is left");
}

#[test]
fn readers_are_bounded_also_when_nobody_wants_their_images() {
    let mut test = TestWorker::new(8, 8);
    let files: Vec<_> = (0..=MAX_READERS).map(|_| test.file()).collect();
    let gone = (0..MAX_READERS as u64).map(|k| test.submit(k, vec![adapted(k, 1)]));
    let gone: Vec<_> = gone.collect();
    test.turn();
    drop(gone);
    let waits = test.submit(8, vec![adapted(8, 1)]);
    let plain = test.submit(9, vec![spec(9, 1)]);
    assert_eq!(stepped(&test.turn()), [9], "images without LoRAs go on");
    while !test.worker.slots.is_empty() {
        test.turn();
    }
    assert!(plain.wait().now_or_never().expect("settled").is_ok());
    assert_eq!((test.worker.readers.len(), test.worker.reading.len()), (MAX_READERS, 0));
    drop(files);
    while !test.idle() || !test.worker.reading.is_empty() {
        assert_eq!(test.worker.wait(), Next::Turn);
        test.turn();
    }
    assert!(waits.wait().now_or_never().expect("settled").is_ok());
}

#[test]
fn a_reader_that_panics_fails_its_image_alone() {
    let mut test = TestWorker::new(8, 8);
    drop(test.file());
    let ticket = test.submit(1, vec![Spec { prompt: "panic".into(), ..adapted(1, 1) }]);
    test.turn();
    assert_eq!(test.worker.wait(), Next::Turn);
    test.turn();
    assert_eq!(ticket.wait().now_or_never().expect("settled").err(), Some(JobError::Model));
    let _next = test.submit(2, vec![spec(2, 1)]);
    assert_eq!(stepped(&test.turn()), [2]);
}

#[test]
fn an_image_that_waits_for_a_file_has_its_rows() {
    let mut test = TestWorker::new(4, 2);
    let (first, second) = (test.file(), test.file());
    let leaves = test.submit(1, vec![adapted(1, 1)]);
    let _second = test.submit(2, vec![spec(2, 1)]);
    let _other = test.submit(3, vec![Spec { size: square(128), ..spec(3, 2) }]);
    assert_eq!(stepped(&test.turn()), [3], "another size has rows of its own");
    test.engine.monitor(&leaves).interrupt();
    let calls = test.turn();
    assert!(
        calls.contains(&Call::Begin(2)),
        "the rows of an interrupted image are free: {calls:?}"
    );
    assert_eq!(leaves.wait().now_or_never().map(|images| images.map(|d| d.len())), Some(Ok(0)));
    drop((first, second));
    let ticket = test.submit(4, vec![adapted(4, 1)]);
    while test.worker.wait() == Next::Turn {
        test.turn();
        test.engine.drain();
    }
    assert!(ticket.wait().now_or_never().expect("settled").is_ok());
}
