//! What a sandbox promises: snapshots that restore exactly, limits that bind, faults told apart.

use std::{
    sync::{Arc, OnceLock, atomic::Ordering},
    time::Duration,
};

use cofferdam_contract::{Batch, OpenContext};
use cofferdam_sandbox::{
    Component, GuestError, Image, Instance, InstanceSetup, Limit, Limits, Sandbox, SandboxOptions,
    SnapshotError, TrackingChoice,
};
use cofferdam_tests::{guest, host::RecordingHost};

fn sandbox(tracking: TrackingChoice) -> &'static Sandbox {
    static BEST: OnceLock<Sandbox> = OnceLock::new();
    static COMPARE: OnceLock<Sandbox> = OnceLock::new();
    let cell = if tracking == TrackingChoice::Best { &BEST } else { &COMPARE };
    cell.get_or_init(|| {
        Sandbox::new(SandboxOptions { tracking, ..SandboxOptions::default() }).expect("a sandbox")
    })
}

fn probe(tracking: TrackingChoice) -> Component {
    static BEST: OnceLock<Component> = OnceLock::new();
    static COMPARE: OnceLock<Component> = OnceLock::new();
    let cell = if tracking == TrackingChoice::Best { &BEST } else { &COMPARE };
    let load = || {
        let bytes = std::fs::read(guest::probe()).expect("the probe");
        sandbox(tracking).load(&bytes).expect("the probe is an operator")
    };
    cell.get_or_init(load).clone()
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("tokio")
        .block_on(future)
}

struct Probe {
    instance: Instance,
    host: Arc<RecordingHost>,
}

async fn open(
    tracking: TrackingChoice,
    limits: Limits,
    config: &[(&str, &str)],
) -> Result<Probe, GuestError> {
    let host = Arc::new(RecordingHost::default());
    open_on(tracking, host, limits, config).await
}

async fn open_on(
    tracking: TrackingChoice,
    host: Arc<RecordingHost>,
    limits: Limits,
    config: &[(&str, &str)],
) -> Result<Probe, GuestError> {
    let setup =
        InstanceSetup { host: host.clone(), limits, capabilities: Default::default(), seed: 7 };
    let mut instance = probe(tracking).instantiate(setup).await?;
    let context = OpenContext {
        operator: "probe",
        task_index: 0,
        parallelism: 1,
        max_parallelism: 128,
        state_cache: None,
        tracks_changes: true,
        config,
    };
    instance.open(context).await?;
    Ok(Probe { instance, host })
}

fn batch(from: u64, count: u64) -> Batch {
    let mut batch = Batch {
        keys: Vec::new(),
        key_ends: Vec::new(),
        values: Vec::new(),
        value_ends: Vec::new(),
        timestamps: Vec::new(),
    };
    for n in from..from + count {
        let n = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 50;
        batch.keys.extend_from_slice(format!("key-{n}").as_bytes());
        batch.key_ends.push(batch.keys.len() as u32);
        batch.value_ends.push(0);
    }
    batch
}

async fn output_of(probe: &mut Probe, batches: std::ops::Range<u64>) -> Vec<u8> {
    let mut output = Vec::new();
    for number in batches {
        let processed = probe.instance.process(0, &batch(number * 100, 100)).await;
        for emission in processed.expect("processes").emissions {
            output.extend(emission.records.values);
        }
    }
    output
}

async fn deed(limits: Limits, config: &[(&str, &str)]) -> GuestError {
    match open(TrackingChoice::Best, limits, config).await {
        Ok(mut probe) => {
            let error = probe.instance.process(0, &batch(0, 10)).await.expect_err("a deed");
            let after = probe.instance.process(0, &batch(0, 1)).await;
            assert!(
                matches!(error, GuestError::Rejected { .. } | GuestError::Failed { .. })
                    || matches!(after, Err(GuestError::Host(_))),
                "an instance that has trapped is gone: {after:?}"
            );
            error
        }
        Err(error) => error,
    }
}

#[test]
fn restored_instance_goes_on_as_if_nothing_had_happened() {
    for tracking in [TrackingChoice::Best, TrackingChoice::Compare] {
        block_on(async {
            let config = [("ballast", "30000000"), ("dirty", "1")];
            let mut golden = open(tracking, Limits::default(), &config).await.expect("opens");
            let mut image = Image::new();
            output_of(&mut golden, 0..20).await;
            image.apply(&golden.instance.snapshot().await.expect("sound")).expect("memory");
            output_of(&mut golden, 20..25).await;
            let second = golden.instance.snapshot().await.expect("sound");
            assert!(0 < second.changed_bytes() && second.changed_bytes() < second.size_bytes());
            image.apply(&second).expect("memory");
            let expected = output_of(&mut golden, 25..60).await;

            // From the image to the end, and with a snapshot of the restored instance in between.
            for restore_again in [false, true] {
                let mut restored = open(tracking, Limits::default(), &config).await.expect("opens");
                restored.instance.restore(&image).await.expect("restores");
                let mut output = output_of(&mut restored, 25..40).await;
                if restore_again {
                    let third = restored.instance.snapshot().await.expect("sound");
                    let (changed, size) = (third.changed_bytes(), third.size_bytes());
                    assert!(changed < size / 2, "{tracking:?}: {changed} of {size} bytes");
                    image.apply(&third).expect("memory");
                    drop(restored);
                    restored = open(tracking, Limits::default(), &config).await.expect("opens");
                    restored.instance.restore(&image).await.expect("restores");
                }
                output.extend(output_of(&mut restored, 40..60).await);
                assert!(output == expected, "{tracking:?} {restore_again}");
            }
        });
    }
}

#[test]
fn untouched_pages_are_not_in_the_next_snapshot() {
    block_on(async {
        let config = [("ballast", "67108864"), ("dirty", "1"), ("quiet", "true")];
        for tracking in [TrackingChoice::Best, TrackingChoice::Compare] {
            let mut probe = open(tracking, Limits::default(), &config).await.expect("opens");
            probe.instance.process(0, &batch(0, 64)).await.expect("processes");
            probe.instance.snapshot().await.expect("sound");
            probe.instance.process(0, &batch(0, 64)).await.expect("processes");
            let changed = probe.instance.snapshot().await.expect("sound").changed_bytes() / 4096;
            assert!((64..90).contains(&changed), "{tracking:?}: {changed} pages");
        }
    });
}

#[test]
fn restoring_an_image_of_another_shape_is_refused() {
    block_on(async {
        let mut probe = open(TrackingChoice::Best, Limits::default(), &[]).await.expect("opens");
        let error = probe.instance.restore(&Image::new()).await.expect_err("an empty image");
        assert!(error.to_string().contains("the snapshot has 0 memories"), "{error}");
    });
}

#[test]
fn memory_limit_binds_at_restore() {
    block_on(async {
        let mut large =
            open(TrackingChoice::Best, Limits::default(), &[("do", "grow")]).await.expect("opens");
        large.instance.process(0, &batch(0, 1)).await.expect("grows");
        let mut image = Image::new();
        image.apply(&large.instance.snapshot().await.expect("sound")).expect("memory");
        let limits = Limits { memory_bytes_max: 8 << 20, ..Limits::default() };
        let mut small = open(TrackingChoice::Best, limits, &[]).await.expect("opens");
        let error = small.instance.restore(&image).await.expect_err("too large");
        assert!(error.to_string().contains("may have 8388608"), "{error}");
    });
}

#[test]
fn trap_comes_with_its_last_words_and_a_readable_backtrace() {
    let error = block_on(deed(Limits::default(), &[("do", "trap"), ("at", "3")]));
    let GuestError::Trap { message, backtrace } = error else { panic!("{error:?}") };
    assert!(message.contains("record 3 is one too many"), "{message}");
    assert!(backtrace[0].contains("probe::Probe"), "{backtrace:#?}");
}

#[test]
fn every_deed_is_told_apart() {
    let short = Limits {
        call_max: Duration::from_millis(50),
        memory_bytes_max: 64 << 20,
        output_bytes_max: 16 << 20,
        ..Limits::default()
    };
    let roomy = Limits { memory_bytes_max: 1 << 30, ..short.clone() };
    let limit = |deed_name: &'static str, limits: &Limits| match block_on(deed(
        limits.clone(),
        &[("do", deed_name)],
    )) {
        GuestError::Limit(limit) => limit,
        other => panic!("{deed_name}: {other:?}"),
    };
    assert!(matches!(limit("spin", &short), Limit::Call { .. }));
    // Standard output is one, and what it writes to another.
    let few = Limits { handles_max: 1, ..short.clone() };
    assert_eq!(limit("println", &few), Limit::Handles { max: 1 });
    assert!(matches!(
        limit("eat-memory", &Limits { call_max: Duration::from_secs(9), ..short.clone() }),
        Limit::Memory { .. }
    ));
    // A guest that keeps its stack in memory runs out of that before the host's stack ends.
    match block_on(deed(
        Limits { call_max: Duration::from_secs(9), ..short.clone() },
        &[("do", "recurse")],
    )) {
        GuestError::Limit(Limit::Stack) => {}
        GuestError::Trap { message, backtrace } => {
            assert!(message.contains("out of bounds"), "{message}");
            assert!(backtrace.iter().any(|frame| frame.contains("recurse")), "{backtrace:?}");
        }
        other => panic!("{other:?}"),
    }
    let huge = Limits { call_max: Duration::from_secs(20), memory_bytes_max: 128 << 20, ..roomy };
    assert!(matches!(limit("huge-output", &huge), Limit::Memory { .. } | Limit::Output { .. }));
    let own =
        |deed_name: &'static str| block_on(deed(short.clone(), &[("do", deed_name), ("at", "2")]));
    assert!(matches!(own("fail"), GuestError::Failed { record: Some(2), .. }));
    assert!(matches!(own("exit"), GuestError::Trap { message, .. } if message.contains("exit")));
    assert!(matches!(own("trap-in-open"), GuestError::Trap { .. }));
    assert!(matches!(own("fail-in-open"), GuestError::Failed { .. }));
}

#[test]
fn a_rejected_record_leaves_the_good_ones_of_its_batch() {
    block_on(async {
        let config = [("do", "reject"), ("at", "2")];
        let mut probe =
            open(TrackingChoice::Best, Limits::default(), &config).await.expect("opens");
        // It rejects its third record and every one after that.
        let processed = probe.instance.process(0, &batch(0, 5)).await.expect("an orderly answer");
        let places: Vec<u32> = processed.rejected.iter().map(|it| it.record).collect();
        assert_eq!(places, [2, 3, 4]);
        assert!(processed.rejected[0].message.contains("a bad smell"));
        assert_eq!(processed.emissions[0].records.value_ends.len(), 2);
        let again = probe.instance.process(0, &batch(0, 1)).await.expect("it goes on");
        assert_eq!(again.rejected.len(), 1);
    });
}

#[test]
fn output_limit_binds_below_the_memory_limit() {
    let limits = Limits {
        output_bytes_max: 1 << 20,
        call_max: Duration::from_secs(20),
        ..Limits::default()
    };
    block_on(async {
        let mut probe = open(TrackingChoice::Best, limits, &[]).await.expect("opens");
        let error = probe.instance.process(0, &batch(0, 200_000)).await.expect_err("too much");
        assert!(matches!(error, GuestError::Limit(Limit::Output { .. })), "{error:?}");
    });
}

#[test]
fn printing_works_before_and_after_a_restore() {
    block_on(async {
        for deed in ["println", "eprintln"] {
            let config = [("do", deed), ("at", "0"), ("attempts", "1")];
            let mut first =
                open(TrackingChoice::Best, Limits::default(), &config).await.expect("opens");
            first.instance.process(0, &batch(0, 5)).await.expect("prints");
            assert_eq!(first.host.messages(), ["record 0"]);
            let mut image = Image::new();
            image.apply(&first.instance.snapshot().await.expect("no new handles")).expect("memory");

            let config = [("do", deed), ("at", "0")];
            let mut before =
                open(TrackingChoice::Best, Limits::default(), &config).await.expect("opens");
            let mut image_before = Image::new();
            image_before.apply(&before.instance.snapshot().await.expect("sound")).expect("memory");
            for image in [&image, &image_before] {
                let mut restored =
                    open(TrackingChoice::Best, Limits::default(), &config).await.expect("opens");
                restored.instance.restore(image).await.expect("restores");
                restored.instance.process(0, &batch(0, 5)).await.expect("prints or counts");
                let printed = restored.host.messages().len();
                assert_eq!(printed, usize::from(std::ptr::eq(image, &raw const image_before)));
            }
            drop(before);
        }
    });
}

#[test]
fn monotonic_clock_never_runs_backwards_over_a_restore() {
    block_on(async {
        let config = [("do", "clock"), ("at", "0")];
        let elapsed = |host: &RecordingHost| -> u64 {
            let messages = host.messages();
            messages.last().and_then(|m| m.strip_prefix("elapsed ")?.parse().ok()).expect("a time")
        };
        let mut first =
            open(TrackingChoice::Best, Limits::default(), &config).await.expect("opens");
        std::thread::sleep(Duration::from_millis(30));
        let mut image = Image::new();
        image.apply(&first.instance.snapshot().await.expect("sound")).expect("memory");
        first.instance.process(0, &batch(0, 1)).await.expect("prints");
        let mut second =
            open(TrackingChoice::Best, Limits::default(), &config).await.expect("opens");
        second.instance.restore(&image).await.expect("restores");
        second.instance.process(0, &batch(0, 1)).await.expect("prints");
        assert!(30_000_000 <= elapsed(&second.host), "{}", elapsed(&second.host));
    });
}

#[test]
fn flood_of_messages_is_cut_and_said_to_be() {
    block_on(async {
        let limits = Limits { call_max: Duration::from_secs(20), ..Limits::default() };
        let mut probe =
            open(TrackingChoice::Best, limits, &[("do", "log-flood")]).await.expect("opens");
        probe.instance.process(0, &batch(0, 1)).await.expect("goes on");
        let host = probe.host.clone();
        drop(probe);
        let messages = host.messages();
        let bytes: usize = messages.iter().map(|message| 128 + message.len()).sum();
        assert!((60 << 10..640 << 10).contains(&bytes), "{bytes} bytes");
        // Those of the last second, too, which no later message could have reported.
        let dropped = |message: &String| -> Option<usize> {
            message.split_once(" messages dropped")?.0.parse().ok()
        };
        let dropped: usize = messages.iter().filter_map(dropped).sum();
        let printed = messages.iter().filter(|message| message.starts_with("line ")).count();
        assert_eq!(printed + dropped, 100_000);
    });
}

#[test]
fn sleeping_guest_does_not_hold_the_thread() {
    block_on(async {
        let mut probe =
            open(TrackingChoice::Best, Limits::default(), &[("do", "sleep")]).await.expect("opens");
        let records = batch(0, 1);
        let call = probe.instance.process(0, &records);
        let ended = tokio::time::timeout(Duration::from_millis(50), call).await;
        assert!(ended.is_err(), "it still sleeps");
        let after = probe.instance.process(0, &records).await;
        assert!(
            matches!(after, Err(GuestError::Host(_))),
            "a call that was dropped poisons: {after:?}"
        );
    });
}

#[test]
fn a_call_that_waits_for_too_long_is_ended() {
    let limits = Limits { wait_max: Duration::from_millis(100), ..Limits::default() };
    let error = block_on(deed(limits, &[("do", "sleep")]));
    assert!(matches!(error, GuestError::Limit(Limit::Wait { .. })), "{error:?}");
    assert_eq!(error.to_string(), "a call waited longer than 100 ms");
}

#[test]
fn attempt_is_live_and_not_part_of_the_snapshot() {
    block_on(async {
        let config = [("do", "trap"), ("at", "150"), ("attempts", "1")];
        let host = Arc::new(RecordingHost::default());
        let mut probe = open_on(TrackingChoice::Best, host.clone(), Limits::default(), &config)
            .await
            .expect("opens");
        probe.instance.process(0, &batch(0, 100)).await.expect("before the trap");
        let mut image = Image::new();
        image.apply(&probe.instance.snapshot().await.expect("sound")).expect("memory");
        probe.instance.process(0, &batch(100, 100)).await.expect_err("the trap");
        host.attempt.store(1, Ordering::Relaxed);
        let mut again =
            open_on(TrackingChoice::Best, host, Limits::default(), &config).await.expect("opens");
        again.instance.restore(&image).await.expect("restores");
        again.instance.process(0, &batch(100, 100)).await.expect("no trap in the second attempt");
    });
}

#[test]
fn handles_taken_after_open_make_a_snapshot_unsound() {
    // The sleeping call above shows that pollables come and go; one that stays is refused. A guest
    // that keeps one is made by asking while it holds it: its call is still running.
    block_on(async {
        let mut probe =
            open(TrackingChoice::Best, Limits::default(), &[("do", "sleep")]).await.expect("opens");
        let records = batch(0, 1);
        let _ =
            tokio::time::timeout(Duration::from_millis(50), probe.instance.process(0, &records))
                .await;
        let error = probe.instance.snapshot().await.expect_err("it holds a pollable");
        assert!(matches!(error, SnapshotError::HandlesHeld { .. }), "{error}");
    });
}

#[test]
fn compiled_code_is_cached_and_damage_to_the_cache_is_harmless() {
    let dir = tempfile::tempdir().expect("a directory");
    let options =
        SandboxOptions { cache_dir: Some(dir.path().join("cache")), ..SandboxOptions::default() };
    let bytes = std::fs::read(guest::probe()).expect("the probe");
    Sandbox::new(options.clone()).expect("a sandbox").load(&bytes).expect("an operator");
    let all = std::fs::read_dir(dir.path().join("cache")).expect("the cache").flatten();
    let is_code = |file: &std::fs::DirEntry| {
        file.path().extension().is_some_and(|extension| extension == "cwasm")
    };
    let files: Vec<_> = all.filter(is_code).collect();
    assert_eq!(files.len(), 1);
    let written = files[0].metadata().expect("a file").modified().expect("a time");
    Sandbox::new(options.clone()).expect("a sandbox").load(&bytes).expect("an operator");
    assert_eq!(files[0].path().metadata().expect("a file").modified().expect("a time"), written);
    std::fs::write(files[0].path(), b"torn").expect("damage");
    Sandbox::new(options).expect("a sandbox").load(&bytes).expect("compiled again");
    assert!(1000 < files[0].path().metadata().expect("a file").len());
}
