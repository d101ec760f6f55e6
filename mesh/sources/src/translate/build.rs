//! Model objects from the objects of a [`Translator`], one at a time.

use std::net::IpAddr;
use std::sync::Arc;

use mesh_model::addr::{Network, NetworkAddr};
use mesh_model::policy::PolicyKey;
use mesh_model::service::{
    HealthPolicy, IpFamilies, LbMode, LbScope, LoadBalancing, Service, ServiceKey, ServicePort, Visibility,
};
use mesh_model::workload::{Health, Locality, NetworkMode, PortMap, Protocol, ServicePorts, Workload};

use super::intern::{Interner, Labels};
use super::object::{EndpointSlice, Kind, ObjectId, Port, Resolution, ServiceEntry, Target, WorkloadEntry};
use super::waypoint::{Found, Traffic, unusable};
use super::{ManySlot, PodSlot, ServiceSlot, Translator};
use crate::diagnostics::{Problem, Severity};

const MODE: &str = "istio.io/dataplane-mode";
const TUNNEL: &str = "networking.istio.io/tunnel";

/// Who owns a host name in a namespace.
enum Owner<'a> {
    Service(&'a ServiceSlot),
    Entry(&'a Arc<str>, &'a ManySlot<ServiceEntry>),
}

impl Translator {
    /// Namespace and name of the Kubernetes Service with this host name.
    pub(super) fn kube_name<'h>(&self, host: &'h str) -> Option<(&'h str, &'h str)> {
        let rest = host.strip_suffix(&*self.view.cluster_domain)?.strip_suffix(".svc.")?;
        let (name, ns) = rest.split_once('.')?;
        (!ns.contains('.')).then_some((ns, name))
    }
    /// The Kubernetes Service with this host name.
    pub(super) fn kube_service(&self, host: &str) -> Option<&ServiceSlot> {
        let (ns, name) = self.kube_name(host)?;
        self.spaces.get(ns)?.services.get(name).filter(|s| !s.obj.external_name)
    }
    /// Kubernetes services win over ServiceEntries, older ServiceEntries over younger (waypoint §1.5).
    fn owner(&self, ns: &str, host: &Arc<str>) -> Option<Owner<'_>> {
        if let Some(s) = self.kube_service(host).filter(|s| &*s.key.namespace == ns) {
            return Some(Owner::Service(s));
        }
        self.entry_of(host, Some(ns)).map(|(_, name, slot)| Owner::Entry(name, slot))
    }
    /// The oldest ServiceEntry that names a host, in one namespace or in all.
    fn entry_of(&self, host: &Arc<str>, ns: Option<&str>) -> Option<(&Arc<str>, &Arc<str>, &ManySlot<ServiceEntry>)> {
        self.host_entries
            .get(host)?
            .iter()
            .filter(|(n, _)| ns.is_none_or(|ns| &**n == ns))
            .filter_map(|(n, name)| {
                let (name, slot) = self.spaces.get(n)?.service_entries.get_key_value(name)?;
                Some((n, name, slot))
            })
            .min_by_key(|(n, name, s)| (s.obj.created.is_empty(), &s.obj.created, *n, *name))
    }
    /// Whether a ServiceEntry owns this one of its hosts.
    fn owns(&self, ns: &str, name: &Arc<str>, host: &Arc<str>) -> bool {
        matches!(self.owner(ns, host), Some(Owner::Entry(n, _)) if n == name)
    }

    /// Labels of the object a service comes from.
    pub(super) fn service_labels(&self, key: &ServiceKey) -> Option<&Labels> {
        Some(match self.owner(&key.namespace, &key.hostname)? {
            Owner::Service(slot) => &slot.obj.labels,
            Owner::Entry(_, slot) => &slot.obj.labels,
        })
    }
    /// The service of a key, with the object it came from and what is wrong with it.
    pub(super) fn build_service(&self, key: &ServiceKey) -> (Option<Service>, ObjectId, Vec<Problem>) {
        let mut problems = Vec::new();
        // By host name, not by object: a ServiceEntry has several, and the owner of a host may change.
        let id = ObjectId { kind: Kind::Service, namespace: Arc::clone(&key.namespace), name: Arc::clone(&key.hostname) };
        let service = match self.owner(&key.namespace, &key.hostname) {
            Some(Owner::Service(slot)) => {
                let name = self.kube_name(&key.hostname).map_or("", |(_, n)| n);
                Some(self.kube_to_service(key, name, slot, &mut problems))
            }
            Some(Owner::Entry(name, slot)) => Some(self.entry_to_service(key, name, slot, &mut problems)),
            None => None,
        };
        (service, id, problems)
    }

    fn kube_to_service(&self, key: &ServiceKey, name: &str, slot: &ServiceSlot, problems: &mut Vec<Problem>) -> Service {
        let obj = &slot.obj;
        let mut lb = if obj.local_only {
            LoadBalancing { scopes: vec![LbScope::Node], mode: LbMode::Strict, health: HealthPolicy::OnlyHealthy }
        } else {
            self.distribution(obj.spec_distribution.as_deref(), obj.distribution.as_deref(), &key.namespace)
        };
        if obj.not_ready {
            lb.health = HealthPolicy::AllowAll;
        }
        let mut trouble = Vec::new();
        let (waypoints, error) = self.service_waypoints(&obj.labels, obj.canary_weight.as_ref(), &key.namespace, &mut trouble);
        Self::waypoint_problems(&slot.origin, error.as_deref(), &obj.labels, trouble, problems);
        Service {
            key: key.clone(),
            name: name.into(),
            vips: obj.vips.iter().map(|ip| NetworkAddr { network: self.view.network.clone(), ip: *ip }).collect(),
            cidr_vips: Vec::new(),
            ports: service_ports(&obj.ports),
            sans: Vec::new(),
            ingress_use_waypoint: self.ingress_uses_waypoint(&obj.labels, &key.namespace)
                && (error.is_some() || !waypoints.is_empty()),
            waypoints,
            waypoint_error: error.map(Into::into),
            lb,
            ip_families: obj.families,
            logical_dns: false,
            global: self.is_global(&key.namespace, &obj.labels),
            canonical: true,
            visibility: Visibility::Public,
            origin: Some(Arc::clone(&slot.origin)),
        }
    }

    fn entry_to_service(
        &self,
        key: &ServiceKey,
        name: &Arc<str>,
        slot: &ManySlot<ServiceEntry>,
        problems: &mut Vec<Problem>,
    ) -> Service {
        let obj = &slot.obj;
        let lb = if obj.resolution == Resolution::None {
            LoadBalancing { scopes: Vec::new(), mode: LbMode::Passthrough, health: HealthPolicy::AllowAll }
        } else {
            self.distribution(None, obj.distribution.as_deref(), &key.namespace)
        };
        let (mut vips, mut cidr_vips) = (Vec::new(), Vec::new());
        for net in &obj.addresses {
            if net.prefix_len() == net.max_prefix_len() {
                vips.push(NetworkAddr { network: self.view.network.clone(), ip: net.addr() });
            } else {
                cidr_vips.push((self.view.network.clone(), *net));
            }
        }
        let wildcard = key.hostname.starts_with("*.");
        if obj.addresses.is_empty()
            && obj.resolution != Resolution::None
            && (!wildcard || obj.resolution == Resolution::DynamicDns)
        {
            let own = obj.auto.iter().filter(|(host, _)| host.is_empty() || *host == key.hostname);
            vips.extend(own.map(|(_, ip)| NetworkAddr { network: self.view.network.clone(), ip: *ip }));
        }
        let mut trouble = Vec::new();
        let (waypoints, error) = self.service_waypoints(&obj.labels, obj.canary_weight.as_ref(), &key.namespace, &mut trouble);
        Self::waypoint_problems(&slot.origin, error.as_deref(), &obj.labels, trouble, problems);
        let canonical = self.kube_service(&key.hostname).is_none()
            && self.entry_of(&key.hostname, None).is_some_and(|(n, m, _)| *n == key.namespace && m == name);
        Service {
            key: key.clone(),
            name: Arc::clone(name),
            vips,
            cidr_vips,
            ports: service_ports(&obj.ports),
            sans: obj.sans.clone(),
            ingress_use_waypoint: self.ingress_uses_waypoint(&obj.labels, &key.namespace)
                && (error.is_some() || !waypoints.is_empty()),
            waypoints,
            waypoint_error: error.map(Into::into),
            lb,
            ip_families: IpFamilies::Automatic,
            logical_dns: obj.resolution == Resolution::DnsRoundRobin,
            global: self.is_global(&key.namespace, &obj.labels),
            canonical,
            visibility: Visibility::Public,
            origin: Some(Arc::clone(&slot.origin)),
        }
    }

    /// An unusable waypoint of the object's own labels is the object's problem; of the namespace's, the namespace's.
    fn waypoint_problems(
        origin: &mesh_model::Origin,
        error: Option<&str>,
        labels: &Labels,
        trouble: Vec<String>,
        problems: &mut Vec<Problem>,
    ) {
        if let Some(why) = error
            && labels.get("istio.io/use-waypoint").is_some_and(|v| !v.is_empty())
        {
            problems.push(unusable(origin, why));
        }
        problems.extend(trouble.into_iter().map(|message| Problem {
            severity: Severity::Warning,
            origin: origin.clone(),
            field: "".into(),
            message: message.into(),
            fix: "".into(),
            code: Some("waypoint-canary"),
        }));
    }

    fn distribution(&self, spec: Option<&str>, annotation: Option<&str>, ns: &str) -> LoadBalancing {
        let zone = || LoadBalancing {
            scopes: vec![LbScope::Network, LbScope::Region, LbScope::Zone],
            mode: LbMode::Failover,
            health: HealthPolicy::OnlyHealthy,
        };
        let node = || LoadBalancing {
            scopes: vec![LbScope::Network, LbScope::Region, LbScope::Zone, LbScope::Subzone, LbScope::Node],
            mode: LbMode::Failover,
            health: HealthPolicy::OnlyHealthy,
        };
        match spec {
            Some("PreferSameZone" | "PreferClose") => return zone(),
            Some("PreferSameNode") => return node(),
            _ => {}
        }
        let inherited = || self.spaces.get(ns).and_then(|s| s.meta.as_ref()).and_then(|m| m.obj.distribution.as_deref());
        match annotation.or_else(inherited).map(str::to_ascii_lowercase).as_deref() {
            Some("prefersamezone" | "preferclose") => zone(),
            Some("prefersamenode") => node(),
            _ => LoadBalancing::default(),
        }
    }

    /// Names of the policies that bind a workload: selecting AuthorizationPolicies, then PeerAuthentication.
    fn bound_policies(&self, ns: &str, labels: &Labels, pool: &mut Interner) -> Arc<[PolicyKey]> {
        let root = &self.view.root_namespace;
        let mut out = Vec::new();
        let spaces = [Some(ns), (ns != &**root).then_some(&**root)];
        for space in spaces.into_iter().flatten().filter_map(|n| self.spaces.get(n)) {
            for name in space.by_policy_selector.selecting(labels) {
                if let Some(p) = space.policies.get(name).and_then(|s| s.obj.policy.as_ref()) {
                    out.push(p.key.clone());
                }
            }
        }
        out.sort();
        out.extend(self.peer_policy(ns, labels));
        pool.policies(out)
    }

    /// What labels say about any workload; the caller adds addresses and services.
    pub(super) fn base(&self, uid: String, name: &Arc<str>, ns: &Arc<str>, labels: &Labels, workload: &Arc<str>) -> Workload {
        let first = |keys: &[&str]| keys.iter().find_map(|k| labels.get(k).filter(|v| !v.is_empty())).cloned();
        Workload {
            uid: uid.into(),
            name: Arc::clone(name),
            namespace: Arc::clone(ns),
            service_account: Arc::clone(&self.default_account),
            trust_domain: self.view.trust_domain.clone(),
            ips: Vec::new(),
            hostname: None,
            network: self.view.network.clone(),
            protocol: Protocol::Tcp,
            network_mode: NetworkMode::Standard,
            native_tunnel: false,
            node: Arc::clone(&self.empty),
            cluster: Arc::clone(&self.view.cluster),
            locality: Locality::default(),
            workload_name: Arc::clone(workload),
            workload_type: Arc::clone(&self.pod_type),
            canonical_name: first(&["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"])
                .unwrap_or_else(|| Arc::clone(workload)),
            canonical_revision: first(&["service.istio.io/canonical-revision", "app.kubernetes.io/version", "version"])
                .unwrap_or_else(|| Arc::clone(&self.latest)),
            health: Health::Healthy,
            capacity: 1,
            services: ServicePorts::default(),
            policies: Arc::default(),
            waypoint: None,
            waypoint_error: None,
            network_gateway: None,
            application_tunnel: None,
            netns: None,
            labels: labels.clone(),
            origin: None,
        }
    }

    fn set_protocol(w: &mut Workload, labels: &Labels, redirected: bool) {
        w.native_tunnel = labels.get(TUNNEL).is_some_and(|t| &**t == "http");
        if redirected || w.native_tunnel {
            w.protocol = Protocol::Hbone;
        }
    }
    fn set_waypoint(&self, w: &mut Workload, labels: &Labels, ns: &str, pool: &mut Interner) -> Option<String> {
        match self.find_waypoint(labels, ns, Traffic::Workload) {
            Found::Nothing => None,
            Found::Use(at) => {
                w.waypoint = Some(Box::new(at));
                None
            }
            Found::Unusable { why, own } => {
                w.waypoint_error = Some(pool.text(&why));
                own.then_some(why)
            }
        }
    }

    /// The CNI's enrolment rule (waypoint §1.2), for runs without a CNI agent that annotates.
    fn enrolled(&self, ns: &str, pod: &super::Pod) -> bool {
        if pod.redirected {
            return true;
        }
        let agent = pod.labels.get("app").is_some_and(|a| &**a == "ztunnel");
        if pod.host_network || pod.sidecar || agent || self.excluded.contains(ns) {
            return false;
        }
        match pod.labels.get(MODE).map(|t| &**t) {
            Some("ambient") => true,
            Some("none") => false,
            _ => self
                .spaces
                .get(ns)
                .and_then(|s| s.meta.as_ref())
                .and_then(|m| m.obj.labels.get(MODE))
                .is_some_and(|m| &**m == "ambient"),
        }
    }

    pub(super) fn build_pod(
        &self,
        ns: &Arc<str>,
        name: &Arc<str>,
        slot: &PodSlot,
        pool: &mut Interner,
    ) -> (Option<Workload>, Vec<Problem>) {
        let pod = &slot.obj;
        if pod.finished || (pod.ips.is_empty() && !self.unaddressed) {
            return (None, Vec::new());
        }
        let uid = format!("{}//Pod/{ns}/{name}", self.view.cluster);
        let mut w = self.base(uid, name, ns, &pod.labels, &pod.workload_name);
        if !pod.service_account.is_empty() {
            w.service_account = Arc::clone(&pod.service_account);
        }
        w.ips = pod.ips.to_vec();
        Self::set_protocol(&mut w, &pod.labels, self.enrolled(ns, pod));
        if pod.host_network {
            w.network_mode = NetworkMode::HostNetwork;
        }
        w.node = Arc::clone(&pod.node);
        w.locality = self.nodes.get(&pod.node).cloned().unwrap_or_default();
        w.health = if pod.ready { Health::Healthy } else { Health::Unhealthy };
        w.services = self.pod_services(ns, name, pod, pool);
        w.policies = self.bound_policies(ns, &pod.labels, pool);
        w.netns.clone_from(&pod.netns);
        w.origin = Some(Arc::clone(&slot.origin));
        let mut problems = Vec::new();
        match self.instance(&pod.labels, ns) {
            Some(instance) => w.application_tunnel = instance.tunnel,
            None => problems.extend(self.set_waypoint(&mut w, &pod.labels, ns, pool).map(|why| unusable(&slot.origin, &why))),
        }
        (Some(w), problems)
    }

    fn pod_services(&self, ns: &Arc<str>, name: &Arc<str>, pod: &super::Pod, pool: &mut Interner) -> ServicePorts {
        let mut out = Vec::new();
        let Some(space) = self.spaces.get(ns) else { return ServicePorts::default() };
        let named = |n: &Arc<str>| pod.ports.iter().find(|(have, _)| have == n).map(|(_, p)| *p);
        let by_slice = space.pod_slices.get(name).into_iter().flatten().filter_map(|s| {
            let slice = &space.slices.get(s)?.obj;
            // A slice may still name the pod of this name that was here before.
            let (_, uid) = slice.pods.iter().find(|(n, _)| n == name)?;
            (uid.is_none() || pod.uid.is_none() || *uid == pod.uid).then_some(&slice.service)
        });
        for service in space.by_service_selector.selecting(&pod.labels).into_iter().chain(by_slice) {
            let Some(s) = space.services.get(service) else { continue };
            let ports = s.obj.ports.iter().filter_map(|p| match &p.target {
                Target::Number(n) => Some((p.port, *n)),
                Target::Name(n) => named(n).map(|t| (p.port, t)),
            });
            out.push((s.key.clone(), pool.ports(ports.collect())));
        }
        for entry in space.by_entry_selector.selecting(&pod.labels) {
            let Some(e) = space.service_entries.get(entry) else { continue };
            let ports: Vec<(u16, u16)> = e
                .obj
                .ports
                .iter()
                .map(|p| (p.port, named(&p.name).filter(|_| !p.name.is_empty()).unwrap_or(number(p))))
                .collect();
            self.add_hosts(&mut out, ns, entry, &e.obj, ports, pool);
        }
        pool.services(out)
    }
    /// Adds the hosts a ServiceEntry owns.
    fn add_hosts(
        &self,
        out: &mut Vec<(ServiceKey, PortMap)>,
        ns: &Arc<str>,
        name: &Arc<str>,
        entry: &ServiceEntry,
        ports: Vec<(u16, u16)>,
        pool: &mut Interner,
    ) {
        let ports = pool.ports(ports);
        for host in entry.hosts.iter().filter(|h| self.owns(ns, name, h)) {
            let key = ServiceKey { namespace: Arc::clone(ns), hostname: Arc::clone(host) };
            out.push((key, Arc::clone(&ports)));
        }
    }

    /// The address part of a WorkloadEntry; `None` when it has neither address nor name.
    fn place(&self, w: &mut Workload, entry: &WorkloadEntry) -> Option<()> {
        match entry.ip {
            Some(ip) => w.ips = vec![ip],
            None if entry.hostname.is_empty() => return None,
            None => w.hostname = Some(Arc::clone(&entry.hostname)),
        }
        if let Some(n) = &entry.network {
            w.network = Network(Arc::clone(n));
            if w.network != self.view.network {
                w.network_gateway = self.networks.get(n).cloned().map(Box::new);
            }
        }
        if !entry.service_account.is_empty() {
            w.service_account = Arc::clone(&entry.service_account);
        }
        w.locality = entry.locality.clone();
        w.capacity = entry.weight.max(1);
        Some(())
    }

    pub(super) fn build_entry(
        &self,
        ns: &Arc<str>,
        name: &Arc<str>,
        slot: &ManySlot<WorkloadEntry>,
        pool: &mut Interner,
    ) -> (Option<Workload>, Vec<Problem>) {
        let entry = &slot.obj;
        let uid = format!("{}/networking.istio.io/WorkloadEntry/{ns}/{name}", self.view.cluster);
        let mut w = self.base(uid, name, ns, &entry.labels, name);
        if self.place(&mut w, entry).is_none() {
            let problem = Problem {
                severity: Severity::Error,
                origin: (*slot.origin).clone(),
                field: "spec.address".into(),
                message: "without an address it cannot be reached".into(),
                fix: "write an IP address or a host name".into(),
                code: Some("missing-field"),
            };
            return (None, vec![problem]);
        }
        Self::set_protocol(&mut w, &entry.labels, entry.redirected);
        w.policies = self.bound_policies(ns, &entry.labels, pool);
        if !entry.healthy {
            w.health = Health::Unhealthy;
        }
        if let Some(node) = &entry.node {
            w.node = Arc::clone(node);
        }
        w.netns.clone_from(&entry.netns);
        w.origin = Some(Arc::clone(&slot.origin));
        if let Some(space) = self.spaces.get(ns) {
            let mut services = Vec::new();
            let named = |n: &Arc<str>| entry.ports.iter().find(|(have, _)| have == n).map(|(_, p)| *p);
            for service in space.by_service_selector.selecting(&entry.labels) {
                let Some(s) = space.services.get(service) else { continue };
                let ports = s.obj.ports.iter().filter_map(|p| match &p.target {
                    Target::Name(n) => named(n).map(|t| (p.port, t)),
                    Target::Number(n) => Some((p.port, named(&p.name).filter(|_| !p.name.is_empty()).unwrap_or(*n))),
                });
                services.push((s.key.clone(), pool.ports(ports.collect())));
            }
            for se in space.by_entry_selector.selecting(&entry.labels) {
                let Some(e) = space.service_entries.get(se) else { continue };
                self.add_hosts(&mut services, ns, se, &e.obj, entry_ports(&e.obj, entry), pool);
            }
            w.services = pool.services(services);
        }
        let problem = self.set_waypoint(&mut w, &entry.labels, ns, pool).map(|why| unusable(&slot.origin, &why));
        (Some(w), problem.into_iter().collect())
    }

    /// Workloads of a ServiceEntry: its inline endpoints, or its hosts themselves when they are to be resolved.
    pub(super) fn build_endpoints(
        &self,
        ns: &Arc<str>,
        name: &Arc<str>,
        slot: &ManySlot<ServiceEntry>,
        pool: &mut Interner,
    ) -> (Vec<Workload>, Vec<Problem>) {
        let se = &slot.obj;
        let (mut out, mut problems): (Vec<Workload>, Vec<Problem>) = (Vec::new(), Vec::new());
        let shadowed: Vec<&str> = se.hosts.iter().filter(|h| !self.owns(ns, name, h)).map(|h| &**h).collect();
        if !shadowed.is_empty() {
            problems.push(Problem {
                severity: Severity::Warning,
                origin: (*slot.origin).clone(),
                field: "spec.hosts".into(),
                message: format!("a Service or an older ServiceEntry of this namespace already has {}", shadowed.join(", "))
                    .into(),
                fix: "remove one of them".into(),
                code: Some("shadowed-host"),
            });
        }
        if shadowed.len() == se.hosts.len() {
            return (out, problems);
        }
        let uid = |at: &str| format!("{}/networking.istio.io/ServiceEntry/{ns}/{name}/{at}", self.view.cluster);
        for endpoint in &se.endpoints {
            let at = endpoint.ip.map_or_else(|| endpoint.hostname.to_string(), |ip: IpAddr| ip.to_string());
            let mut w = self.base(uid(&at), name, ns, &se.labels, name);
            if !endpoint.labels.is_empty() {
                // Subsets select by the endpoint's own labels; names and policies go by those of the ServiceEntry.
                w.labels = pool.labels(se.labels.iter().chain(endpoint.labels.iter()).cloned().collect());
            }
            if self.place(&mut w, endpoint).is_none() || out.iter().any(|have| have.uid == w.uid) {
                problems.push(Problem {
                    severity: Severity::Warning,
                    origin: (*slot.origin).clone(),
                    field: "spec.endpoints".into(),
                    message: if at.is_empty() {
                        "an endpoint without address is left out".into()
                    } else {
                        format!("the endpoint {at} is listed twice; the first counts").into()
                    },
                    fix: "".into(),
                    code: Some("endpoint"),
                });
                continue;
            }
            Self::set_protocol(&mut w, &se.labels, se.redirected);
            w.policies = self.bound_policies(ns, &se.labels, pool);
            let mut services = Vec::new();
            self.add_hosts(&mut services, ns, name, se, entry_ports(se, endpoint), pool);
            w.services = pool.services(services);
            problems.extend(self.set_waypoint(&mut w, &endpoint.labels, ns, pool).map(|why| unusable(&slot.origin, &why)));
            w.origin = Some(Arc::clone(&slot.origin));
            out.push(w);
        }
        let by_name = matches!(se.resolution, Resolution::Dns | Resolution::DnsRoundRobin | Resolution::DynamicDns);
        if by_name && se.endpoints.is_empty() && se.selector.as_ref().is_none_or(Labels::is_empty) {
            let ports = pool.ports(se.ports.iter().map(|p| (p.port, number(p))).collect());
            for host in se.hosts.iter().filter(|h| self.owns(ns, name, h)) {
                let mut w = self.base(uid(host), name, ns, &se.labels, name);
                w.hostname = Some(Arc::clone(host));
                Self::set_protocol(&mut w, &se.labels, se.redirected);
                w.policies = self.bound_policies(ns, &se.labels, pool);
                let key = ServiceKey { namespace: Arc::clone(ns), hostname: Arc::clone(host) };
                w.services.insert(key, Arc::clone(&ports));
                w.origin = Some(Arc::clone(&slot.origin));
                out.push(w);
            }
        }
        (out, problems)
    }

    /// Endpoints of a Service that are not pods: the API server, Endpoints written by hand.
    pub(super) fn build_slice(
        &self,
        ns: &Arc<str>,
        name: &Arc<str>,
        slot: &ManySlot<EndpointSlice>,
        pool: &mut Interner,
    ) -> Vec<Workload> {
        let slice = &slot.obj;
        let service = self.spaces.get(ns).and_then(|s| s.services.get(&slice.service));
        let Some(service) = service.filter(|s| !s.obj.external_name) else { return Vec::new() };
        let ports = service
            .obj
            .ports
            .iter()
            .filter_map(|p| slice.ports.iter().find(|(n, _)| *n == p.name).map(|(_, target)| (p.port, *target)));
        let ports = pool.ports(ports.collect());
        let mut out: Vec<Workload> = Vec::new();
        let none = Labels::default();
        for (ip, ready) in &slice.others {
            let uid = format!("{}/discovery.k8s.io/EndpointSlice/{ns}/{name}/{ip}", self.view.cluster);
            let mut w = self.base(uid, name, ns, &none, name);
            w.ips = vec![*ip];
            w.network_mode = NetworkMode::HostNetwork;
            w.health = if *ready { Health::Healthy } else { Health::Unhealthy };
            w.services.insert(service.key.clone(), Arc::clone(&ports));
            w.origin = Some(Arc::clone(&slot.origin));
            if out.iter().all(|have| have.uid != w.uid) {
                out.push(w);
            }
        }
        out
    }
}

fn number(p: &Port) -> u16 {
    match p.target {
        Target::Number(n) => n,
        Target::Name(_) => p.port,
    }
}
fn entry_ports(se: &ServiceEntry, endpoint: &WorkloadEntry) -> Vec<(u16, u16)> {
    let named = |n: &Arc<str>| endpoint.ports.iter().find(|(have, _)| have == n).map(|(_, p)| *p);
    se.ports.iter().map(|p| (p.port, named(&p.name).unwrap_or(number(p)))).collect()
}
fn service_ports(ports: &[Port]) -> Vec<ServicePort> {
    ports
        .iter()
        .map(|p| ServicePort {
            port: p.port,
            target: match p.target {
                Target::Number(n) => n,
                Target::Name(_) => 0,
            },
            protocol: p.app,
        })
        .collect()
}
