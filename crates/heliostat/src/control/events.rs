//! Events as clients see them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use heliostat_block::job::{ErrorAction, JobEvent, Operation};
use serde_json::{Value, json};

use crate::daemon::{Event, Happening};

/// The message for an event.
#[must_use]
pub fn message(event: &Event) -> Value {
    let (name, data) = match &event.what {
        Happening::ExportDeleted { id } => ("BLOCK_EXPORT_DELETED", json!({ "id": id })),
        Happening::BitmapNotStored { node, name } => {
            ("BLOCK_DIRTY_BITMAP_NOT_STORED", json!({ "node-name": node, "name": name }))
        }
        Happening::ImageCorrupt { node, text, range, is_fatal } => {
            let mut data = json!({ "device": "", "msg": text, "node-name": node, "fatal": is_fatal });
            if let Some(range) = range {
                data["offset"] = json!(range.offset());
                data["size"] = json!(range.len());
            }
            ("BLOCK_IMAGE_CORRUPTED", data)
        }
        Happening::Job { id, event, offset, len, pause, speed } => {
            job_event(id, event, &Counts { offset: *offset, len: *len, pause: *pause, speed: *speed })
        }
    };
    json!({ "timestamp": timestamp(event.at), "event": name, "data": data })
}

/// A job's numbers at the moment of an event.
struct Counts {
    offset: u64,
    len: u64,
    pause: Option<Duration>,
    speed: u64,
}

fn job_event(id: &str, event: &JobEvent, counts: &Counts) -> (&'static str, Value) {
    let Counts { offset, len, pause, speed } = counts;
    let with_counts = json!({ "device": id, "len": len, "offset": offset, "speed": speed, "type": "mirror" });
    match event {
        JobEvent::Status(status) => ("JOB_STATUS_CHANGE", json!({ "status": status.name(), "id": id })),
        JobEvent::Ready => ("BLOCK_JOB_READY", with_counts),
        JobEvent::Pending => ("BLOCK_JOB_PENDING", json!({ "type": "mirror", "id": id })),
        JobEvent::Completed(None) => {
            let mut data = with_counts;
            if let Some(pause) = pause {
                data["pause-us"] = json!(u64::try_from(pause.as_micros()).unwrap_or(u64::MAX));
            }
            ("BLOCK_JOB_COMPLETED", data)
        }
        JobEvent::Completed(Some(error)) => {
            let mut data = with_counts;
            data["error"] = json!(error);
            ("BLOCK_JOB_COMPLETED", data)
        }
        JobEvent::Cancelled => ("BLOCK_JOB_CANCELLED", with_counts),
        JobEvent::Degraded(reason) => {
            let mut data = json!({ "device": id, "degraded": reason.is_some() });
            if let Some(reason) = reason {
                data["reason"] = json!(reason);
            }
            ("BLOCK_JOB_DEGRADED", data)
        }
        JobEvent::Error { operation, action, node, range, errno } => {
            let mut data = json!({
                "device": id,
                "operation": match operation {
                    Operation::Read => "read",
                    Operation::Write => "write",
                },
                "action": match action {
                    ErrorAction::Report => "report",
                    ErrorAction::Ignore => "ignore",
                    ErrorAction::Stop => "stop",
                },
                "node-name": node,
            });
            if let Some(range) = range {
                data["offset"] = json!(range.offset());
                data["length"] = json!(range.len());
            }
            if let Some(errno) = errno {
                data["errno"] = json!(errno);
            }
            ("BLOCK_JOB_ERROR", data)
        }
    }
}

fn timestamp(at: SystemTime) -> Value {
    // A clock that stands before 1970 is shown as standing there.
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    json!({ "seconds": since.as_secs(), "microseconds": since.subsec_micros() })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use heliostat_block::job::JobStatus;
    use heliostat_block::range::ByteRange;

    use super::*;
    use crate::control::schema::{EVENTS, Need};

    /// Whatever happens, with all that may be said of it and without what may be missing.
    fn all() -> Vec<Happening> {
        let range = Some(ByteRange::from_bounds(0, 512));
        let job =
            |event, pause| Happening::Job { id: "j".to_owned(), event, offset: 1, len: 2, pause, speed: 3 };
        let error = |range, errno| JobEvent::Error {
            operation: Operation::Read,
            action: ErrorAction::Stop,
            node: "n".to_owned(),
            range,
            errno,
        };
        let corrupt = |range| Happening::ImageCorrupt {
            node: "n".to_owned(),
            text: "t".to_owned(),
            range,
            is_fatal: true,
        };
        vec![
            Happening::ExportDeleted { id: "e".to_owned() },
            Happening::BitmapNotStored { node: "n".to_owned(), name: "b".to_owned() },
            corrupt(None),
            corrupt(range),
            job(JobEvent::Status(JobStatus::Running), None),
            job(JobEvent::Ready, None),
            job(JobEvent::Pending, None),
            job(JobEvent::Completed(None), Some(Duration::from_micros(1))),
            job(JobEvent::Completed(None), None),
            job(JobEvent::Completed(Some("no".to_owned())), None),
            job(JobEvent::Cancelled, None),
            job(JobEvent::Degraded(Some("why".to_owned())), None),
            job(JobEvent::Degraded(None), None),
            job(error(None, None), None),
            job(error(range, Some(5)), None),
        ]
    }

    #[test]
    fn every_event_says_what_the_schema_says_and_the_schema_has_no_other() {
        let mut said = BTreeSet::new();
        for what in all() {
            // A new one belongs into the list above.
            match &what {
                Happening::ExportDeleted { .. }
                | Happening::BitmapNotStored { .. }
                | Happening::ImageCorrupt { .. } => {}
                Happening::Job { event, .. } => match event {
                    JobEvent::Status(_)
                    | JobEvent::Ready
                    | JobEvent::Pending
                    | JobEvent::Completed(_)
                    | JobEvent::Cancelled
                    | JobEvent::Degraded(_)
                    | JobEvent::Error { .. } => {}
                },
            }
            let message = message(&Event { at: SystemTime::now(), what });
            let name = message["event"].as_str().unwrap();
            let event = EVENTS.iter().find(|event| event.name == name);
            let event = event.unwrap_or_else(|| panic!("{name} is not in the schema"));
            let data = message["data"].as_object().unwrap();
            for key in data.keys() {
                let is_known = event.says.members.iter().any(|member| member.name == key);
                assert!(is_known, "{name}: {key} is not in the schema");
                said.insert((name.to_owned(), key.clone()));
            }
            let missing = event
                .says
                .members
                .iter()
                .find(|member| member.need == Need::Required && !data.contains_key(member.name));
            assert!(missing.is_none(), "{name}: {missing:?} is missing");
        }
        let known = EVENTS.iter().flat_map(|event| {
            event.says.members.iter().map(|member| (event.name.to_owned(), member.name.to_owned()))
        });
        assert_eq!(known.collect::<BTreeSet<_>>(), said);
    }
}
