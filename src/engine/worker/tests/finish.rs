//! How images end: decoded, checked, interrupted.

use super::*;

#[tokio::test]
async fn pictures_are_decoded_one_at_a_time_between_steps() {
    let mut test = TestWorker::new(8, 12);
    let _held = test.submit(0, [1, 1, 1, 1, 5].map(|steps| spec(steps, steps as usize)).into());
    for turn in 0..4 {
        let calls = test.turn();
        let work: Vec<_> = calls.iter().filter(|calls| !matches!(calls, Call::Begin(_))).collect();
        assert!(matches!(work[..], [Call::Step(_), Call::Decode(1)]), "turn {turn}: {calls:?}");
    }
}

#[tokio::test]
async fn tiles_are_decoded_one_at_a_time_between_steps_as_long_as_they_are_wanted() {
    let mut test = TestWorker::new(8, 12);
    let _held = test.submit(0, vec![spec(9, 9)]);
    let tiled = |seed| vec![Spec { vae_tiling: Some(true), ..spec(seed, 1) }];
    let decodes = |calls: Vec<Call>| {
        assert!(calls.iter().any(|call| matches!(call, Call::Step(_))), "{calls:?}");
        calls.into_iter().filter(|call| matches!(call, Call::Decode(_))).collect::<Vec<_>>()
    };
    let whole = test.submit(1, tiled(1));
    for _ in 0..TILES {
        assert_eq!(decodes(test.turn()), [Call::Decode(1)]);
    }
    assert!(whole.wait().await.is_ok_and(|images| images.len() == 1));
    let given_up = test.submit(1, tiled(2));
    assert_eq!(decodes(test.turn()), [Call::Decode(2)]);
    drop(given_up);
    assert_eq!(decodes(test.turn()), []);
}

#[test]
fn what_does_not_fit_as_a_whole_is_decoded_in_tiles_with_a_warning() {
    let mut test = TestWorker::new(8, 12);
    let memory = MemoryEstimate {
        scale: 8,
        decode_bytes: 1000,
        tile: Some(128),
        ..MemoryEstimate::default()
    };
    test.worker.model.info.memory = memory;
    let info = test.worker.model.info.clone();
    test.engine.shared.set_model(info.clone());
    // A tile, and 12 bytes for each pixel of the whole.
    let most = 1000 * 128 * 128 + 12 * 256 * 256;
    let large = || Spec { size: square(256), ..spec(1, 1) };
    let chosen = |spec: Spec, default: bool, budget: u64| {
        let mut spec = spec;
        info.choose_tiles(&mut spec, default, budget);
        (spec.vae_tiling, spec.warnings.len(), info.peak_bytes(&spec) <= budget)
    };
    assert_eq!(chosen(large(), false, u64::MAX), (None, 0, true));
    assert_eq!(chosen(large(), false, most), (Some(true), 1, true));
    assert_eq!(chosen(large(), false, most - 1), (Some(true), 1, false));
    assert_eq!(chosen(large(), true, most), (Some(true), 0, true));
    let never = Spec { vae_tiling: Some(false), ..large() };
    assert_eq!(chosen(never, true, most), (Some(false), 0, false));
    let edgeless = Spec { tiling: true, ..large() };
    assert_eq!(chosen(edgeless, true, most), (None, 0, false));
    assert_eq!(chosen(spec(1, 1), false, 1), (None, 0, false), "no larger than a tile");

    test.engine.shared.device.set_budget_bytes(most);
    let ticket = test.submit(0, vec![large()]);
    while !test.idle() {
        test.turn();
    }
    assert!(ticket.wait().now_or_never().is_some_and(|images| images.is_ok()));
    test.engine.shared.device.set_budget_bytes(most - 1);
    let refused = test.try_submit(0, vec![large()], None).err();
    assert_eq!(refused, Some(JobError::OutOfMemory));
}

/// The result of one image of a model with a safety checker, and its turns.
fn checked(
    safety: Safety,
    flags: Option<bool>,
) -> (Result<Vec<GeneratedImage>, JobError>, Vec<Vec<Call>>) {
    let mut test = TestWorker::with(4, 4, safety);
    test.worker.model.info.checked = true;
    test.worker.model.flags = flags;
    let ticket = test.submit(1, vec![spec(1, 1)]);
    let mut turns = Vec::new();
    while !test.idle() {
        turns.push(test.turn());
    }
    (ticket.wait().now_or_never().expect("settled"), turns)
}

#[tokio::test]
async fn a_skip_while_no_image_runs_ends_none_of_those_that_follow() {
    let mut test = TestWorker::new(4, 2);
    let ticket = test.submit(1, vec![spec(1, 1), spec(2, 2)]);
    let monitor = test.engine.monitor(&ticket);
    while stepped(&test.turn()) != [1] {}
    monitor.skip();
    while !test.idle() {
        test.turn();
    }
    let images = ticket.wait().await.expect("completed");
    assert_eq!(images.iter().map(|image| image.warnings.len()).collect::<Vec<_>>(), [0, 0]);
}

#[test]
fn a_picture_is_judged_a_turn_after_it_is_decoded() {
    let mut test = TestWorker::with(4, 8, Safety::Blur);
    test.worker.model.info.checked = true;
    test.worker.model.flags = Some(false);
    let _long = test.submit(1, vec![spec(9, 6)]);
    let _short = test.submit(1, vec![spec(1, 1), spec(2, 1)]);
    let mut after = Vec::new();
    while !test.idle() {
        let calls = test.turn();
        let images: Vec<Call> = calls
            .into_iter()
            .filter(|call| matches!(call, Call::Decode(_) | Call::CheckSafety))
            .collect();
        assert!(images.len() <= 1, "at most one between two steps: {images:?}");
        after.extend(images);
    }
    let (one, two, long) = (Call::Decode(1), Call::Decode(2), Call::Decode(9));
    assert_eq!(after, [one, Call::CheckSafety, two, Call::CheckSafety, long, Call::CheckSafety]);
}

#[test]
fn a_flagged_image_is_marked_blurred_or_an_error() {
    let original: Vec<u8> = (0..16 * 16 * 3).map(|i| i as u8).collect();
    let one =
        |checked: Result<Vec<GeneratedImage>, JobError>| checked.expect("completed").remove(0);
    for safety in [Safety::Flag, Safety::Blur, Safety::Block] {
        let passed = one(checked(safety, Some(false)).0);
        assert_eq!((passed.nsfw, passed.warnings.len()), (Some(false), 0));
        assert_eq!(passed.rgb.data, original);
        let failed = checked(safety, None).0.expect_err("a failed check fails the image");
        assert_eq!(failed, JobError::OutOfMemory);
    }
    let flagged = one(checked(Safety::Flag, Some(true)).0);
    assert_eq!((flagged.nsfw, flagged.warnings.len()), (Some(true), 1));
    assert_eq!(flagged.rgb.data, original);
    let blurred = one(checked(Safety::Blur, Some(true)).0);
    assert_eq!(blurred.nsfw, Some(true));
    assert!(blurred.warnings[0].ends_with("it is blurred") && blurred.rgb.data != original);
    let (blocked, turns) = checked(Safety::Block, Some(true));
    assert_eq!(blocked.expect_err("blocked"), JobError::Withheld);
    assert_eq!(turns.len(), 2, "{turns:?}");
}

#[test]
fn an_interrupted_job_returns_partly_denoised_images() {
    let mut test = TestWorker::new(10, 4);
    let ticket = test.submit(1, vec![spec(1, 9), spec(2, 9), spec(3, 9)]);
    let other = test.submit(2, vec![spec(4, 3)]);
    assert_eq!(stepped(&test.turn()), [1, 4]);
    let watch = test.engine.monitor(&ticket);
    watch.interrupt();
    let calls = test.turn();
    assert!(calls.contains(&Call::Decode(1)) && !calls.contains(&Call::Begin(2)), "{calls:?}");
    let images = ticket.wait().now_or_never().expect("it is over").expect("no failure");
    let found: Vec<_> = images.iter().map(|image| (image.index, &image.warnings[..])).collect();
    assert_eq!(found, [(0, &["interrupted after 1 of 9 UNet calls".to_owned()][..])]);
    assert_eq!(test.counted("cancelled"), 2);
    while !test.idle() {
        test.turn();
    }
    let images = other.wait().now_or_never().expect("it is over").expect("no failure");
    assert!(images[0].warnings.is_empty(), "other jobs are not interrupted");
}

#[test]
fn an_interrupted_picture_of_which_there_is_nothing_to_see_is_left_out() {
    let mut test = TestWorker::new(10, 4);
    let first = test.submit(1, vec![Spec { size: square(128), ..spec(1, 9) }]);
    test.turn();
    let ticket = test.submit(2, vec![spec(2, 9)]);
    test.engine.monitor(&ticket).interrupt();
    assert!(!test.turn().contains(&Call::Begin(2)));
    assert_eq!(ticket.wait().now_or_never().map(|images| images.map(|d| d.len())), Some(Ok(0)));
    assert_eq!(first.progress().borrow().completed, 2);
}
