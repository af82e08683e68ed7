//! fio as a guest: random writes through NBD, as fast as they go or at a rate, with each request's latency.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::daemon::Daemon;

/// What fio does.
pub struct Load<'a> {
    /// The NBD server's socket and the export's name.
    pub socket: &'a Path,
    pub export: &'a str,
    /// `randwrite` or `randread`.
    pub pattern: &'a str,
    pub depth: u32,
    /// Connections, each with that depth.
    pub connections: u32,
    /// Bytes of the disk that it works on.
    pub size: u64,
    pub time: Duration,
    /// Requests a second; as fast as they go where there is none.
    pub rate: Option<u32>,
}

impl Load<'_> {
    fn command(&self) -> Command {
        let mut command = Command::new("fio");
        let uri = format!("nbd+unix:///{}?socket={}", self.export, self.socket.display());
        command.args(["--name=guest", "--ioengine=nbd", "--bs=4k", "--time_based", "--norandommap"]);
        command.args(["--randrepeat=0", "--output-format=json"]);
        command.arg(format!("--uri={uri}")).arg(format!("--rw={}", self.pattern));
        command.arg(format!("--iodepth={}", self.depth)).arg(format!("--size={}", self.size));
        command.arg(format!("--runtime={}ms", self.time.as_millis()));
        if self.connections > 1 {
            command.arg(format!("--numjobs={}", self.connections)).arg("--group_reporting");
        }
        if let Some(rate) = self.rate {
            command.arg(format!("--rate_iops={rate}"));
        }
        command
    }

    /// Runs it to its end; requests a second.
    pub fn requests_a_second(&self, folder: &Path) -> Result<f64> {
        Ok(self.requests(folder)?.a_second)
    }

    /// Runs it to its end.
    pub fn requests(&self, folder: &Path) -> Result<Requests> {
        let report = folder.join("fio.json");
        run(self.command().arg("--output").arg(&report))?;
        let job = &read_report(&report)?["jobs"][0];
        ensure!(job["error"] == 0, "fio saw an error: {}", job["error"]);
        let side = if self.pattern == "randread" { "read" } else { "write" };
        let figure =
            |name: &str| job[side][name].as_f64().with_context(|| format!("fio's report has no {name}"));
        Ok(Requests { count: figure("total_ios")?, a_second: figure("iops")? })
    }

    /// Starts it beside what is measured; [`Guest::stop`] gives the latencies.
    pub fn start(&self, folder: &Path) -> Result<Guest> {
        let log = folder.join("guest");
        let mut command = self.command();
        command.arg(format!("--write_lat_log={}", log.display()));
        command.args(["--log_unix_epoch=1", "--per_job_logs=0"]);
        command.arg("--output").arg(folder.join("fio.json"));
        let process = Daemon::start(&mut command).context("starting fio")?;
        Ok(Guest { process, folder: folder.to_owned() })
    }
}

/// What fio has done.
pub struct Requests {
    pub count: f64,
    pub a_second: f64,
}

/// fio running beside something else.
pub struct Guest {
    process: Daemon,
    folder: PathBuf,
}

impl Guest {
    /// Stops it; every request that it made.
    pub fn stop(self) -> Result<Latencies> {
        self.process.signal("INT")?;
        // Its status says that it was interrupted; its report says whether it was well.
        self.process.wait().context("waiting for fio")?;
        let job = &read_report(&self.folder.join("fio.json"))?["jobs"][0];
        ensure!(job["error"] == 0, "fio saw an error: {}", job["error"]);
        let log = std::fs::read_to_string(self.folder.join("guest_lat.log")).context("fio's log")?;
        Latencies::parse(&log)
    }
}

/// Runs fio with these arguments to its end.
pub fn run(command: &mut Command) -> Result<()> {
    let output = command.output().context("starting fio")?;
    ensure!(output.status.success(), "fio: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

pub fn read_report(file: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(file).context("fio's report")?;
    // Engines may print a line of their own before it.
    let start = text.find('{').context("fio's report holds no JSON")?;
    serde_json::from_str(&text[start..]).context("fio's report")
}

/// A moment as fio's log has it: milliseconds since 1970.
pub fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// When each request ended (ms since 1970), and how long it took (ns).
pub struct Latencies(Vec<(u64, u64)>);

/// Figures of the requests that ended in some span of time, in milliseconds.
#[derive(Debug, PartialEq)]
pub struct Spread {
    pub mean_ms: f64,
    pub p99_ms: f64,
    pub longest_ms: f64,
}

impl Latencies {
    fn parse(log: &str) -> Result<Self> {
        let mut all = Vec::new();
        for line in log.lines() {
            let mut fields = line.split(',').map(|field| field.trim().parse::<u64>());
            let (Some(Ok(at)), Some(Ok(took))) = (fields.next(), fields.next()) else {
                anyhow::bail!("fio's log has a line {line:?}");
            };
            all.push((at, took));
        }
        Ok(Self(all))
    }

    /// The spread of those that ended from `start` to `end`, both in ms since 1970.
    pub fn between(&self, start: u64, end: u64) -> Result<Spread> {
        let inside = self.0.iter().filter(|(at, _)| (start..=end).contains(at));
        let mut took: Vec<u64> = inside.map(|(_, took)| *took).collect();
        took.sort_unstable();
        let longest = *took.last().context("no request ended in that time")?;
        let p99 = took[(took.len() * 99 / 100).min(took.len() - 1)];
        let count = u32::try_from(took.len()).context("more requests than fio can make")?;
        let mean_ms = took.iter().map(|took| ms(*took)).sum::<f64>() / f64::from(count);
        Ok(Spread { mean_ms, p99_ms: ms(p99), longest_ms: ms(longest) })
    }
}

fn ms(ns: u64) -> f64 {
    Duration::from_nanos(ns).as_secs_f64() * 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_gives_the_spread_of_a_span() {
        let log: String =
            (1..=200).map(|n| format!("{}, {}, 1, 4096, 0\n", 1000 + n, n * 1_000_000)).collect();
        let latencies = Latencies::parse(&log).unwrap();
        assert_eq!(
            latencies.between(1001, 1100).unwrap(),
            Spread { mean_ms: 50.5, p99_ms: 100.0, longest_ms: 100.0 }
        );
        assert_eq!(
            latencies.between(0, 9999).unwrap(),
            Spread { mean_ms: 100.5, p99_ms: 199.0, longest_ms: 200.0 }
        );
        assert!(latencies.between(0, 10).is_err(), "nothing ended then");
    }

    #[test]
    fn a_broken_log_is_refused() {
        assert!(Latencies::parse("1000, x\n").is_err());
    }
}
