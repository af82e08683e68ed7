//! Every verb in every status, in both families of commands, with ends that come by themselves and ends that wait:
//! hundreds of small conversations with `qemu-storage-daemon` and ours, generated and compared.
//!
//! What a verb leads to is told by [`Model`], so that each conversation goes on when the job has come to rest; nothing
//! sleeps. What may differ, and nothing else:
//!
//! - How far a job has come that is held on its way: how much is copied at once is each one's own business. Offsets and
//!   lengths of such jobs are not compared.
//! - `busy`, for the same reason, and `paused` of a pending job: ours holds no guest there (MIRROR.md section 5).
//! - `actively-synced` of a job that has been told to double writes: QEMU's finds out in the next tenth of a second.
//! - A job of ours goes back from write-blocking to background; there is no conversation about that here.

mod common;
mod qmp;

use qmp::transcript::Step::{Await, Do};
use qmp::transcript::{Script, Transcript, run};
use qmp::verbs::{At, FEW, Model, ORDERS, compare, differences, named, order, wait};
use qmp::{Peer, Whose};
use serde_json::{Value, json};

const SIZE: usize = 1 << 20;

/// How a conversation begins: the job's name begins so, its arguments, and what is asked of it until it is where the
/// verb is to find it.
struct Beginning {
    name: &'static str,
    at: At,
    arguments: Value,
    orders: &'static [usize],
}

fn beginnings() -> Vec<Beginning> {
    let begin = |name, at, arguments, orders| Beginning { name, at, arguments, orders };
    let held = || json!({ "sync": "full", "speed": 1, "buf-size": 65536, "granularity": 65536 });
    let idle = || json!({ "sync": "none" });
    let larger = || json!({ "sync": "full", "target": "larger" });
    vec![
        begin("held", At::Running, held(), &[]),
        begin("held-paused", At::Running, held(), &[0]),
        begin("ready", At::Ready, idle(), &[]),
        begin("standby", At::Ready, idle(), &[0]),
        begin("standby-ending", At::Ready, idle(), &[1, 8]),
        begin("ended", At::Ready, idle(), &[7]),
        begin("ended-copy", At::Ready, idle(), &[4]),
        begin("cancelled", At::Ready, idle(), &[6]),
        begin("held-cancelled", At::Running, held(), &[4]),
        begin("failed", At::Concluded, larger(), &[]),
    ]
}

/// One conversation: a job of its own is brought somewhere, hears `orders`, and is brought to its end.
fn conversation(
    id: &str,
    beginning: &Beginning,
    (finalizes, dismisses): (bool, bool),
    orders: &[usize],
) -> Script {
    let mut arguments = json!({
        "job-id": id, "device": "s", "target": "t", "auto-finalize": finalizes, "auto-dismiss": dismisses,
    });
    for (key, value) in beginning.arguments.as_object().into_iter().flatten() {
        arguments[key] = value.clone();
    }
    let mut model = Model { at: beginning.at, ends: None, fails: false, finalizes, dismisses };
    if model.at == At::Concluded && dismisses {
        model.at = At::Null;
    }
    let mut script = vec![Do("blockdev-mirror", arguments), wait(id, model.at)];
    if model.at == At::Ready {
        script.push(Await("BLOCK_JOB_READY", named(id)));
    }
    let mut ask = |order_of: usize, model: &mut Model| {
        let asked = ORDERS[order_of];
        script.push(order(id, asked));
        let heard = model.take(asked.1);
        script.extend(heard.into_iter().map(|at| wait(id, at)));
        if model.at == At::Pending && !beginning.name.starts_with("held") {
            script.push(Do("query-jobs", json!({})));
        } else {
            script.push(Do("query-block-jobs", json!({})));
        }
    };
    beginning.orders.iter().chain(orders).for_each(|order| ask(*order, &mut model));
    // Whatever it is up to, it ends.
    ask(6, &mut model);
    if model.at == At::Concluded {
        ask(12, &mut model);
    }
    assert_eq!(model.at, At::Null, "{}: {orders:?}", beginning.name);
    script
}

fn nodes() -> Script {
    let file = |node: &str| {
        Do("blockdev-add", json!({ "driver": "file", "node-name": node, "filename": format!("DIR/{node}") }))
    };
    ["s", "t", "larger"].map(file).into()
}

/// Each order alone, wherever a job can be, with every way to end.
fn one_order_each() -> Script {
    let mut script = nodes();
    for beginning in &beginnings() {
        for (index, ways) in
            [(true, true), (true, false), (false, true), (false, false)].into_iter().enumerate()
        {
            for which in 0..ORDERS.len() {
                let id = format!("{}-{index}-{which}", beginning.name);
                script.extend(conversation(&id, beginning, ways, &[which]));
            }
        }
    }
    script
}

/// Each order after each other, where a job goes on after one.
fn two_orders_each() -> Script {
    let mut script = nodes();
    let all = beginnings();
    for beginning in all.iter().filter(|beginning| !beginning.name.contains("cancelled")) {
        for first in FEW {
            for second in FEW {
                let id = format!("{}-{first}-{second}", beginning.name);
                script.extend(conversation(&id, beginning, (false, false), &[first, second]));
            }
        }
    }
    script
}

fn talk(peer: &Peer, script: &Script) -> Transcript {
    for (name, size) in [("s", SIZE), ("t", SIZE), ("larger", 2 * SIZE)] {
        peer.image(name, size);
    }
    run(peer, script)
}

#[test]
fn every_verb_in_every_status_does_the_same() {
    compare(&one_order_each(), talk);
}

#[test]
fn every_verb_after_every_other_does_the_same() {
    compare(&two_orders_each(), talk);
}

#[test]
fn a_planted_difference_is_found() {
    let all = beginnings();
    let ready = all.iter().find(|beginning| beginning.name == "ready").expect("it is in the list");
    let whole = |ways, orders: &[usize]| {
        let mut script = nodes();
        script.extend(conversation("ready-1", ready, ways, orders));
        talk(&Peer::ours(), &script)
    };
    let plain = whole((true, true), &[7]);
    assert_eq!(differences(&plain, &whole((true, true), &[7])), Vec::<String>::new());
    // As a daemon would look that does not pass through PENDING, or that cancels where it should complete.
    let mut skips = whole((true, true), &[7]);
    skips.events.values_mut().for_each(|said| said.retain(|event| !event.contains("pending")));
    assert_eq!(differences(&plain, &skips).len(), 1);
    let mut accepts = whole((true, true), &[7]);
    accepts.replies.last_mut().expect("something was asked").1 = json!({ "return": {} }).to_string();
    assert_eq!(differences(&plain, &accepts).len(), 1);
    assert_eq!(Peer::ours().whose(), Whose::Ours);
}
