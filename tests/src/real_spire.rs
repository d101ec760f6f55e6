//! Real SPIRE: a server and an agent of one trust domain on this machine, and the entries a test makes. Workloads are told apart
//! by the path of their program.
//!
//! Owns: both processes, a directory. What is not installed is told by [`missing`] (`tests/spire/install.sh` builds it).
use std::fs::{self, File};
use std::io::Write as _;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, ensure};

use crate::skip::find_peer;
use crate::wait;

const PROGRAMS: [&str; 2] = ["spire-server", "spire-agent"];
/// How long a new server or agent may take.
const STARTED: Duration = Duration::from_mins(1);

/// Why SPIRE cannot run here.
pub fn missing() -> Option<String> {
    PROGRAMS.into_iter().find_map(|program| find_peer(program).err())
}

/// Server and agent. They end when dropped.
#[derive(Debug)]
pub struct RealSpire {
    server: Child,
    agent: Option<Child>,
    dir: PathBuf,
    domain: String,
}

impl RealSpire {
    /// Starts both, with everything in `dir`. Programs with the id `spiffe://<domain>/delegate` are its delegates.
    pub fn start(dir: &Path, domain: &str) -> anyhow::Result<Self> {
        fs::create_dir_all(dir)?;
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
        let dir = dir.canonicalize()?;
        fs::write(dir.join("server.conf"), server_conf(&dir, domain, port))?;
        fs::write(dir.join("agent.conf"), agent_conf(&dir, domain, port))?;
        let server = run("spire-server", &dir, "server", &[])?;
        let mut this = Self { server, agent: None, dir, domain: domain.into() };
        wait::until("SPIRE's server", STARTED, || this.server(&["healthcheck"]).ok()).with_context(|| this.logs())?;
        let node = format!("spiffe://{domain}/node");
        let said = this.server(&["token", "generate", "-spiffeID", &node])?;
        let token = said.lines().find_map(|line| line.strip_prefix("Token: ")).context("a token")?.to_owned();
        this.start_agent(&["-joinToken", &token])?;
        Ok(this)
    }

    fn start_agent(&mut self, arguments: &[&str]) -> anyhow::Result<()> {
        self.agent = Some(run("spire-agent", &self.dir, "agent", arguments)?);
        let socket = self.dir.join("public/api.sock");
        let healthy = || {
            let mut check = Command::new(find_peer("spire-agent").ok()?);
            check.arg("healthcheck").arg("-socketPath").arg(&socket);
            check.output().is_ok_and(|out| out.status.success()).then_some(())
        };
        wait::until("SPIRE's agent", STARTED, healthy).with_context(|| self.logs())
    }

    /// Kills the agent.
    pub fn kill_agent(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            let _gone_already = agent.kill();
            let _reaped = agent.wait();
        }
    }

    /// Starts it again; it knows its node from its files.
    pub fn restart_agent(&mut self) -> anyhow::Result<()> {
        self.start_agent(&[])
    }

    /// The socket of the Workload API.
    pub fn workload_api(&self) -> String {
        format!("unix://{}/public/api.sock", self.dir.display())
    }

    /// The socket of the Delegated Identity API.
    pub fn admin(&self) -> String {
        format!("unix://{}/admin/admin.sock", self.dir.display())
    }

    /// Registers `/path` for workloads with these selectors; their certificates last for `life`.
    pub fn entry(&self, path: &str, selectors: &[&str], life: Duration, federates_with: &[&str]) -> anyhow::Result<()> {
        let (id, node) = (format!("spiffe://{}{path}", self.domain), format!("spiffe://{}/node", self.domain));
        let (life, mut rest) = (life.as_secs().to_string(), Vec::new());
        for selector in selectors {
            rest.extend(["-selector", selector]);
        }
        for domain in federates_with {
            rest.extend(["-federatesWith", domain]);
        }
        let first = ["entry", "create", "-parentID", &node, "-spiffeID", &id, "-x509SVIDTTL", &life];
        self.server(&[&first, rest.as_slice()].concat()).map(drop)
    }

    /// Its bundle, as other trust domains take it.
    pub fn bundle(&self) -> anyhow::Result<String> {
        self.server(&["bundle", "show", "-format", "spiffe"])
    }

    /// Its roots, PEM.
    pub fn roots(&self) -> anyhow::Result<String> {
        self.server(&["bundle", "show", "-format", "pem"])
    }

    /// Knows the bundle of another trust domain from now on.
    pub fn federate(&self, domain: &str, bundle: &str) -> anyhow::Result<()> {
        let file = self.dir.join(format!("{domain}.json"));
        File::create(&file)?.write_all(bundle.as_bytes())?;
        let (id, file) = (format!("spiffe://{domain}"), file.to_string_lossy().into_owned());
        self.server(&["bundle", "set", "-format", "spiffe", "-id", &id, "-path", &file]).map(drop)
    }

    /// The ends of both logs.
    pub fn logs(&self) -> String {
        let tail = |name: &str| {
            let text = fs::read_to_string(self.dir.join(name)).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            format!("{name}:\n{}", lines[lines.len().saturating_sub(15)..].join("\n"))
        };
        format!("{}\n{}", tail("server.log"), tail("agent.log"))
    }

    /// A command of the server's own program.
    fn server(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let program = find_peer("spire-server").map_err(anyhow::Error::msg)?;
        let socket = self.dir.join("server.sock");
        let mut command = Command::new(program);
        // The flag of the socket follows the words of the command.
        let words = arguments.iter().take_while(|word| !word.starts_with('-')).count();
        command.args(&arguments[..words]).arg("-socketPath").arg(socket).args(&arguments[words..]);
        let output = command.output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(output.status.success(), "{arguments:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
        Ok(text)
    }
}

impl Drop for RealSpire {
    fn drop(&mut self) {
        self.kill_agent();
        let _gone_already = self.server.kill();
        let _reaped = self.server.wait();
    }
}

fn run(program: &str, dir: &Path, name: &str, arguments: &[&str]) -> anyhow::Result<Child> {
    let log = File::options().create(true).append(true).open(dir.join(format!("{name}.log")))?;
    let mut command = Command::new(find_peer(program).map_err(anyhow::Error::msg)?);
    command.arg("run").arg("-config").arg(dir.join(format!("{name}.conf"))).args(arguments);
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn().with_context(|| format!("start {program}"))
}

fn server_conf(dir: &Path, domain: &str, port: u16) -> String {
    let dir = dir.display();
    format!(
        r#"
server {{
    bind_address = "127.0.0.1"
    bind_port = "{port}"
    socket_path = "{dir}/server.sock"
    trust_domain = "{domain}"
    data_dir = "{dir}/server"
    log_level = "INFO"
}}
plugins {{
    DataStore "sql" {{ plugin_data {{ database_type = "sqlite3", connection_string = "{dir}/entries.sqlite3" }} }}
    NodeAttestor "join_token" {{ plugin_data {{}} }}
    KeyManager "memory" {{ plugin_data {{}} }}
}}
"#
    )
}

fn agent_conf(dir: &Path, domain: &str, port: u16) -> String {
    let dir = dir.display();
    format!(
        r#"
agent {{
    server_address = "127.0.0.1"
    server_port = "{port}"
    socket_path = "{dir}/public/api.sock"
    admin_socket_path = "{dir}/admin/admin.sock"
    trust_domain = "{domain}"
    data_dir = "{dir}/agent"
    insecure_bootstrap = true
    authorized_delegates = ["spiffe://{domain}/delegate"]
    log_level = "INFO"
    experimental {{ sync_interval = "1s" }}
}}
plugins {{
    NodeAttestor "join_token" {{ plugin_data {{}} }}
    KeyManager "disk" {{ plugin_data {{ directory = "{dir}/agent" }} }}
    WorkloadAttestor "unix" {{ plugin_data {{ discover_workload_path = true }} }}
}}
"#
    )
}
