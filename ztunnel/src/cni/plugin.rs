//! The plugin's side, after the CNI specification 1.1: `CNI_*` variables and a network configuration in, the result of the
//! plugins before it or an error as JSON out.
//!
//! ADD waits until the agent has captured the pod. CHECK asks whether it still is. DEL and GC have nothing to undo: what a pod
//! had goes with its network namespace. STATUS never complains, not even without an agent: a node whose network is called not
//! ready starts no pods at all, the agent's own among them.
use super::{Answer, Entry, Request, Unreachable};
use crate::unix::seqpacket;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, connect, recv, sendmsg};
use serde::Deserialize;
use serde_json::{Value, json};
use std::fs::File;
use std::io::{self, IoSlice, Read as _};
use std::mem::MaybeUninit;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// Versions with a list of plugins and results handed from one to the next.
const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// How long the agent may take; it gives up before (`desk`).
const PATIENCE: Duration = Duration::from_secs(30);
/// Longest answer.
const LONGEST: usize = 4096;

/// Codes of the specification, and ours.
mod code {
    pub const VERSION: u32 = 1;
    pub const ENVIRONMENT: u32 = 4;
    pub const IO: u32 = 5;
    pub const DECODING: u32 = 6;
    pub const CONFIGURATION: u32 = 7;
    pub const LATER: u32 = 11;
    /// The agent cannot capture the pod.
    pub const NOT_CAPTURED: u32 = 100;
}

/// What the runtime is told when something is wrong.
#[derive(Debug, PartialEq, Eq)]
struct Fault {
    code: u32,
    msg: &'static str,
    details: String,
}

fn fault(code: u32, msg: &'static str, details: impl ToString) -> Fault {
    Fault { code, msg, details: details.to_string() }
}

/// What a call comes to.
#[derive(Debug, PartialEq)]
enum Step {
    /// This is the answer; nothing for none.
    Say(Option<Value>),
    /// The agent is to be asked.
    Ask(Box<Question>),
}

/// A question to the agent.
#[derive(Debug, PartialEq)]
struct Question {
    socket: PathBuf,
    unreachable: Unreachable,
    request: Request,
    netns: PathBuf,
    /// The answer to the runtime if the pod may go on.
    good: Option<Value>,
}

/// A network configuration as this plugin gets it.
#[derive(Debug, Deserialize)]
struct Config {
    #[serde(rename = "cniVersion", default)]
    version: String,
    #[serde(rename = "prevResult")]
    previous: Option<Value>,
    #[serde(flatten)]
    entry: Option<Entry>,
}

/// One call, from this process's own environment and standard input.
pub fn main() -> ExitCode {
    let mut input = String::new();
    let read = io::stdin().read_to_string(&mut input);
    let outcome = match read {
        Ok(_) => first(|name| std::env::var(name).ok(), &input).and_then(|step| match step {
            Step::Say(answer) => Ok(answer),
            Step::Ask(question) => ask(*question),
        }),
        Err(error) => Err(fault(code::IO, "the network configuration cannot be read", error)),
    };
    match outcome {
        Ok(None) => ExitCode::SUCCESS,
        Ok(Some(answer)) => {
            println!("{answer}");
            ExitCode::SUCCESS
        }
        Err(Fault { code, msg, details }) => {
            let version = serde_json::from_str::<Value>(&input).ok().and_then(|c| c["cniVersion"].as_str().map(str::to_owned));
            let version = version.unwrap_or_else(|| "1.0.0".to_owned());
            println!("{}", json!({ "cniVersion": version, "code": code, "msg": msg, "details": details }));
            ExitCode::FAILURE
        }
    }
}

/// What to do, without doing it.
fn first(env: impl Fn(&str) -> Option<String>, input: &str) -> Result<Step, Fault> {
    let needed = |name: &'static str| {
        env(name).filter(|value| !value.is_empty()).ok_or_else(|| fault(code::ENVIRONMENT, "a variable is missing", name))
    };
    let command = needed("CNI_COMMAND")?;
    let config: Config =
        serde_json::from_str(input).map_err(|error| fault(code::DECODING, "the network configuration cannot be read", error))?;
    if command == "VERSION" {
        return Ok(Step::Say(Some(json!({ "cniVersion": config.version, "supportedVersions": VERSIONS }))));
    }
    if !VERSIONS.contains(&config.version.as_str()) {
        let details = format!("{:?} is none of {}", config.version, VERSIONS.join(", "));
        return Err(fault(code::VERSION, "incompatible CNI version", details));
    }
    match command.as_str() {
        "ADD" | "CHECK" => {}
        "DEL" | "GC" | "STATUS" => return Ok(Step::Say(None)),
        other => return Err(fault(code::ENVIRONMENT, "CNI_COMMAND is not known", other)),
    }
    needed("CNI_CONTAINERID")?;
    needed("CNI_IFNAME")?;
    let netns = needed("CNI_NETNS")?.into();
    let entry = config.entry.ok_or_else(|| fault(code::CONFIGURATION, "incomplete configuration", "socket, unreachable"))?;
    let previous = config.previous.filter(Value::is_object).ok_or_else(|| {
        fault(code::CONFIGURATION, "prevResult is missing", "this plugin gives no network: it is chained behind those that do")
    })?;
    let check = command == "CHECK";
    let good = (!check).then_some(previous);
    let Some(request) = request(&env("CNI_ARGS").unwrap_or_default(), check) else { return Ok(Step::Say(good)) };
    if entry.exclude_namespaces.contains(&request.namespace) {
        return Ok(Step::Say(good));
    }
    Ok(Step::Ask(Box::new(Question { socket: entry.socket, unreachable: entry.unreachable, request, netns, good })))
}

/// Which pod it is, by what a kubelet's runtime adds to a call; a container that is no pod is nobody's business.
fn request(args: &str, check: bool) -> Option<Request> {
    let find = |key: &str| {
        let value = args.split(';').filter_map(|pair| pair.split_once('=')).find(|(name, _)| *name == key)?.1;
        (!value.is_empty()).then(|| value.to_owned())
    };
    let (namespace, name) = (find("K8S_POD_NAMESPACE")?, find("K8S_POD_NAME")?);
    Some(Request { check, namespace, name, uid: find("K8S_POD_UID") })
}

fn ask(question: Question) -> Result<Option<Value>, Fault> {
    let netns = File::open(&question.netns).map_err(|error| {
        fault(code::IO, "the network namespace cannot be opened", format!("{}: {error}", question.netns.display()))
    })?;
    let answer = exchange(&question.socket, &question.request, &netns);
    if let (Err(error), Unreachable::Allow) = (&answer, question.unreachable) {
        // Runtimes put what a plugin says here into their logs.
        let Request { namespace, name, .. } = &question.request;
        eprintln!("{namespace}/{name} starts without the mesh: {}: {error}", question.socket.display());
    }
    conclude(question, answer)
}

/// What the runtime is told.
fn conclude(question: Question, answer: io::Result<Answer>) -> Result<Option<Value>, Fault> {
    match (answer, question.unreachable) {
        (Ok(Answer::Captured | Answer::NotEnrolled), _) | (Err(_), Unreachable::Allow) => Ok(question.good),
        (Ok(Answer::Refused { why, later: true }), _) => Err(fault(code::LATER, "the pod is not captured yet", why)),
        (Ok(Answer::Refused { why, later: false }), _) => Err(fault(code::NOT_CAPTURED, "the pod cannot be captured", why)),
        (Err(error), Unreachable::Refuse) => {
            let details = format!("{}: {error}", question.socket.display());
            Err(fault(code::LATER, "no mesh agent answers on this node", details))
        }
    }
}

/// One question and its answer.
fn exchange(path: &Path, request: &Request, netns: &File) -> io::Result<Answer> {
    let socket = seqpacket()?;
    set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE))?;
    set_socket_timeout(&socket, Timeout::Send, Some(PATIENCE))?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    let body = serde_json::to_vec(request)?;
    let fds = [netns.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::Error::other("no room for a descriptor"));
    }
    sendmsg(&socket, &[IoSlice::new(&body)], &mut control, SendFlags::NOSIGNAL)?;
    let mut answer = [0; LONGEST];
    let (_, length) = recv(&socket, &mut answer, RecvFlags::empty())?;
    if length == 0 {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it went instead of answering"));
    }
    Ok(serde_json::from_slice(answer.get(..length).unwrap_or_default())?)
}

#[cfg(test)]
mod tests;
