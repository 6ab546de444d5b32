//! Who steps next, and with whom.

use super::*;

#[tokio::test]
async fn clients_with_waiting_images_get_the_same_work() {
    let mut test = TestWorker::new(300, 8);
    // Many images at once, large images, one image at a time.
    let large = |seed| Spec { size: square(128), ..spec(seed, 4) };
    let mut held = vec![test.submit(0, (0..200).map(|_| spec(0, 4)).collect())];
    held.push(test.submit(1, (0..50).map(|_| large(1)).collect()));
    let mut work = [0_usize; 3];
    let mut small = test.submit(2, vec![spec(2, 4)]);
    for _ in 0..200 {
        for call in test.turn() {
            let Call::Step(specs) = call else { continue };
            for spec in specs {
                work[spec.seed as usize] += spec.size.pixels() * spec.rows();
            }
        }
        if small.progress().borrow().completed == 4 {
            small = test.submit(2, vec![spec(2, 4)]);
        }
    }
    // The third has at most one image in flight.
    assert!(work[2] > 0 && work[0].max(work[1]) < 2 * work[0].min(work[1]), "{work:?}");
}

#[tokio::test]
async fn neither_large_nor_small_pictures_starve() {
    for (common, rare) in [(64, 256), (256, 64)] {
        let mut test = TestWorker::new(8, 4);
        let sized = |seed, side| Spec { size: square(side), ..spec(seed, 4) };
        let mut held = vec![test.submit(0, vec![sized(0, common), sized(0, common)])];
        let one = test.submit(1, vec![sized(1, rare)]);
        let mut turns = 0;
        while one.progress().borrow().completed < 4 {
            while let Ok(ticket) = test.try_submit(0, vec![sized(0, common)], None) {
                held.push(ticket);
            }
            test.turn();
            turns += 1;
            // A step of two small rows costs a thirty-second of one of four large rows.
            assert!(turns <= 4 * 33, "{rare} waits for {common}");
        }
    }
}

#[tokio::test]
async fn rows_are_freed_and_taken_between_steps() {
    let mut test = TestWorker::new(8, 4);
    let cancelled = test.submit(0, vec![spec(1, 100)]);
    let neighbour = test.submit(0, vec![spec(2, 3)]);
    let next = test.submit(0, vec![spec(3, 1)]);
    assert_eq!(stepped(&test.turn()), [1, 2], "four rows are two images with guidance");
    drop(cancelled);
    assert_eq!(stepped(&test.turn()), [2, 3], "the next step has another image in its rows");
    assert_eq!((test.counted("cancelled"), stepped(&test.turn())), (1, vec![2]));
    test.turn();
    assert!(test.idle());
    assert_eq!(neighbour.wait().await.map(|images| images.len()), Ok(1));
    assert_eq!(next.wait().await.map(|images| images.len()), Ok(1));
}

#[tokio::test]
async fn encoding_of_many_prompts_does_not_delay_the_steps() {
    let mut test = TestWorker::new(64, 64);
    test.worker.model.reading = Duration::from_millis(2);
    let begun = |calls: &[Call]| calls.iter().filter(|call| matches!(call, Call::Begin(_))).count();
    let _first = test.submit(0, vec![spec(0, 50); 4]);
    assert_eq!(begun(&test.turn()), 4, "nothing runs yet: the batch is filled");
    let _many = test.submit(0, vec![spec(1, 50); 20]);
    // A step of this model takes less time than the text of one image.
    for _ in 0..20 {
        assert_eq!(begun(&test.turn()), 1);
    }
    assert_eq!(stepped(&test.turn()).len(), 24);
}

#[tokio::test]
async fn an_image_does_not_wait_for_others() {
    let mut test = TestWorker::new(8, 8);
    let _one = test.submit(0, vec![spec(1, 4)]);
    assert_eq!(stepped(&test.turn()), [1]);
    let _two = test.submit(0, vec![Spec { guidance_scale: 1.0, ..spec(2, 9) }]);
    assert_eq!(stepped(&test.turn()), [1, 2], "another step count, guidance and start");
}

#[test]
fn a_hires_pass_shares_steps_with_images_of_its_size() {
    let mut test = TestWorker::new(4, 8);
    let _large = test.submit(1, vec![Spec { size: square(128), ..spec(1, 12) }]);
    let _small = test.submit(2, vec![spec(2, 12)]);
    let grows = Spec { hires: Some(hires(128, 3)), ..spec(3, 2) };
    let ticket = test.submit(3, vec![grows]);
    let mut steps = Vec::new();
    while !test.idle() {
        let seeds = stepped(&test.turn());
        steps.extend(seeds.contains(&3).then_some(seeds));
    }
    assert_eq!(steps, [vec![2, 3], vec![2, 3], vec![1, 3], vec![1, 3], vec![1, 3]]);
    let progress = *ticket.progress().borrow();
    assert_eq!((progress.completed, progress.total), (5, 5), "of both passes");
    assert!(ticket.wait().now_or_never().expect("settled").is_ok());
}

#[test]
fn a_second_pass_that_never_fits_is_refused_at_once() {
    let test = TestWorker::new(4, 8);
    let mut info = test.worker.model.info.clone();
    info.memory.decode_bytes = 10;
    let (device, settings) = (DeviceScheduler::default(), test.engine.shared.settings);
    let engine = Engine::new(&device, settings, EngineState::Loading, false);
    engine.shared.set_state(EngineState::Ready(Arc::new(info)));
    engine.shared.device.set_budget_bytes(10 * 64 * 64);
    let grows = |side| Spec { hires: Some(hires(side, 1)), ..spec(1, 1) };
    assert!(engine.submit(vec![spec(1, 1)]).is_ok());
    assert_eq!(engine.submit(vec![grows(128)]).err(), Some(JobError::OutOfMemory));
    assert!(engine.submit(vec![grows(32)]).is_ok());
}

#[test]
fn a_client_with_many_sizes_leaves_room_and_time_for_others() {
    let mut test = TestWorker::new(64, 4);
    let sizes = [56, 72, 80, 88].map(square);
    let odd = sizes.iter().flat_map(|size| vec![Spec { size: *size, ..spec(0, 100) }; 2]);
    let _many = test.submit(0, odd.collect());
    for _ in 0..8 {
        test.turn();
    }
    let _one = test.submit(1, vec![spec(1, 100), spec(1, 100)]);
    let mut work = [0_usize; 2];
    for _ in 0..100 {
        for call in test.turn() {
            let Call::Step(specs) = call else { continue };
            for spec in specs {
                work[spec.seed as usize] += spec.size.pixels() * spec.rows();
            }
        }
    }
    assert!(work[0].abs_diff(work[1]) * 10 < work[0] + work[1], "{work:?}");
}

#[test]
fn the_memory_of_a_prompt_counts_in_its_step() {
    let mut test = TestWorker::new(4, 8);
    test.worker.model.info.memory.chunk_bytes = 1000;
    test.engine.shared.device.set_budget_bytes(10_000);
    // Three chunks and one: 8000 bytes. One and one: 4000.
    let long = |seed| Spec {
        prompt: "word ".repeat(100),
        prompt_syntax: PromptSyntax::A1111,
        ..spec(seed, 2)
    };
    let _tickets =
        [long(1), long(2), spec(3, 2), spec(4, 2)].map(|spec| test.submit(spec.seed, vec![spec]));
    let mut steps = Vec::new();
    while !test.idle() {
        steps.push(stepped(&test.turn()));
    }
    steps.retain(|seeds| !seeds.is_empty());
    let expected: [&[u64]; 6] = [&[1], &[1], &[2], &[2], &[3, 4], &[3, 4]];
    assert_eq!(steps, expected);
}

#[tokio::test]
async fn pictures_that_are_enlarged_take_turns_and_leave_others_theirs() {
    let mut test = TestWorker::new(8, 8);
    let picture = Rgb { width: 32, height: 32, data: vec![0; 3 * 32 * 32] };
    let upscaler = PictureUpscaler::Lanczos;
    let enlarge = Enlarge { picture, scale: 2.0, canvas: None, upscaler, second: None };
    let enlarge = |seed| Spec { enlarge: Some(Arc::new(enlarge.clone())), ..spec(seed, 1) };
    let enlarged = test.submit(0, vec![enlarge(0), enlarge(0)]);
    let drawn = test.submit(1, vec![spec(1, 1000)]);
    let mut steps = Vec::new();
    while enlarged.progress().borrow().completed < 2 * TILES {
        for call in test.turn() {
            let Call::Step(specs) = call else { continue };
            assert!(specs.len() == 1 || specs.iter().all(|spec| spec.enlarge.is_none()), "alone");
            steps.push(specs[0].enlarge.is_some());
        }
    }
    // A tile takes as long as 54 UNet calls of two rows of 64 x 64 pixels.
    let between = drawn.progress().borrow().completed;
    assert!((4 * 50..7 * 60).contains(&between), "{between} UNet calls");
    let waits = steps.split(|tile| *tile).map(<[bool]>::len);
    assert!(waits.max() < Some(120), "no tile waits for long");
    test.engine.abort();
    drop((enlarged, drawn));
}

/// What there is no memory for, or what a file cannot compute, says nothing of the batches of others.
#[tokio::test]
async fn an_image_that_fails_alone_leaves_the_batches_of_others_whole() {
    let picture = Rgb { width: 32, height: 32, data: vec![0; 3 * 32 * 32] };
    let upscaler = PictureUpscaler::Lanczos;
    let enlarge = Enlarge { picture, scale: 2.0, canvas: None, upscaler, second: None };
    let enlarge = Some(Arc::new(enlarge));
    for (prompt, enlarge) in [("too much", enlarge), ("overflow", None)] {
        let mut test = TestWorker::new(8, 8);
        let failing = test.submit(0, vec![Spec { prompt: prompt.into(), enlarge, ..spec(0, 1) }]);
        let drawn = test.submit(1, vec![spec(1, 4), spec(2, 4)]);
        let mut steps = Vec::new();
        while !test.idle() {
            steps.push(stepped(&test.turn()));
        }
        assert!(test.worker.caps.is_empty(), "{prompt}");
        let error = failing.wait().await.err();
        match prompt {
            "overflow" => assert!(matches!(error, Some(JobError::Spec { .. })), "{error:?}"),
            _ => assert!(matches!(error, Some(JobError::OutOfMemory)), "{error:?}"),
        }
        assert_eq!(drawn.wait().await.map(|images| images.len()), Ok(2));
        steps.retain(|seeds| !seeds.is_empty());
        assert_eq!(steps, vec![vec![1, 2]; 4], "{prompt}");
    }
}

/// As a device does that is out of memory for four rows, beside a picture that is enlarged.
#[tokio::test]
async fn a_batch_is_halved_beside_a_picture_that_is_enlarged() {
    let mut test = TestWorker::new(8, 8);
    test.worker.model.capacity = 2;
    let picture = Rgb { width: 32, height: 32, data: vec![0; 3 * 32 * 32] };
    let upscaler = PictureUpscaler::Lanczos;
    let enlarge = Enlarge { picture, scale: 2.0, canvas: None, upscaler, second: None };
    let enlarged = test.submit(0, vec![Spec { enlarge: Some(Arc::new(enlarge)), ..spec(0, 1) }]);
    let drawn = test.submit(1, vec![spec(1, 2), spec(2, 2)]);
    let mut steps = Vec::new();
    while !test.idle() {
        steps.push(stepped(&test.turn()));
    }
    for (ticket, images) in [(enlarged, 1), (drawn, 2)] {
        assert_eq!(ticket.wait().await.map(|done| done.len()), Ok(images));
    }
    steps.retain(|seeds| !seeds.is_empty());
    assert!(steps.iter().all(|seeds| seeds.len() == 1), "{steps:?}");
    assert_eq!(steps.len(), 4 + TILES);
}

#[test]
fn what_add_ons_may_take_is_left_out_of_the_budget() {
    let mut test = TestWorker::new(1, 2);
    let budget = |test: &TestWorker| start::budget(&test.worker.model, &test.engine.shared);
    test.worker.model.free = Some(1000);
    assert_eq!(budget(&test), 800);
    let add_ons = &mut test.worker.model.info.add_ons;
    add_ons.max_upscaler_bytes = 100;
    add_ons.max_lora_bytes = 200;
    add_ons.max_controlnet_bytes = 300;
    assert_eq!(budget(&test), 800, "there are none");
    let folder = || Some(std::path::PathBuf::from("/"));
    test.worker.model.info.add_ons.upscalers.directory = folder();
    assert_eq!(budget(&test), 720);
    test.worker.model.info.add_ons.loras.directory = folder();
    assert_eq!(budget(&test), 560);
    test.worker.model.info.add_ons.controlnets.directory = folder();
    assert_eq!(budget(&test), 400, "at most half");
}
