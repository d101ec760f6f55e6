// istiod-fed serves what Istio's own control plane makes of a folder of Kubernetes objects, as delta ADS in plaintext.
//
// The objects go to client-go's fake API server; what is behind it (the ambient index, the discovery server, its gRPC service)
// is Istio's own code. What a real API server would add is added (the defaults of ports), and what the CNI agent would: pods
// that would be enrolled say so. A line on standard input makes it look at the folder again: what is new, changed or gone there
// becomes so in the API server, and `read` is printed. The end of the input ends it.
package main

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"sort"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
	gatewayfake "sigs.k8s.io/gateway-api/pkg/client/clientset/versioned/fake"

	"istio.io/api/annotation"
	"istio.io/api/label"
	meshconfig "istio.io/api/mesh/v1alpha1"
	istiofake "istio.io/client-go/pkg/clientset/versioned/fake"
	"istio.io/istio/pilot/pkg/features"
	"istio.io/istio/pilot/test/xds"
	"istio.io/istio/pkg/config"
	"istio.io/istio/pkg/config/mesh"
	"istio.io/istio/pkg/config/schema/gvk"
	"istio.io/istio/pkg/kube"
	"istio.io/istio/pkg/test"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: istiod-fed FOLDER LISTEN-ADDRESS")
		os.Exit(2)
	}
	if err := test.Wrap(func(t test.Failer) { serve(t, os.Args[1], os.Args[2]) }); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func serve(t test.Failer, folder, address string) {
	if !features.EnableAmbient {
		t.Fatal("PILOT_ENABLE_AMBIENT is not true")
	}
	objects, err := read(folder)
	if err != nil {
		t.Fatal(err)
	}
	meshConfig, err := meshConfigOf(objects)
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	var all []runtime.Object
	for _, o := range objects {
		all = append(all, o.DeepCopyObject())
	}
	server := xds.NewFakeDiscoveryServer(t, xds.FakeOptions{
		KubernetesObjects: all,
		MeshConfig:        meshConfig,
		ListenerBuilder:   func() (net.Listener, error) { return listener, nil },
	})
	fmt.Printf("serving %s\n", listener.Addr())
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		next, err := read(folder)
		if err == nil {
			err = change(server.KubeClient(), objects, next)
		}
		if err != nil {
			t.Fatal(err)
		}
		objects = next
		fmt.Println("read")
	}
}

// change makes the API server hold the objects of `after` where it held those of `before`.
func change(client kube.Client, before, after map[string]runtime.Object) error {
	for name, object := range after {
		old, had := before[name]
		if had && reflect.DeepEqual(old, object) {
			continue
		}
		where, err := placeOf(client, object)
		if err != nil {
			return err
		}
		if had {
			err = where.tracker.Update(where.resource, object.DeepCopyObject(), where.namespace)
		} else {
			err = where.tracker.Create(where.resource, object.DeepCopyObject(), where.namespace)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	for name, object := range before {
		if _, still := after[name]; still {
			continue
		}
		where, err := placeOf(client, object)
		if err != nil {
			return err
		}
		if err := where.tracker.Delete(where.resource, where.namespace, where.name); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

type place struct {
	tracker         clienttesting.ObjectTracker
	resource        schema.GroupVersionResource
	namespace, name string
}

// placeOf says where the fake API server keeps an object: each client has a store of its own.
func placeOf(client kube.Client, object runtime.Object) (place, error) {
	meta, ok := object.(metav1.Object)
	if !ok {
		return place{}, errors.New("an object without metadata")
	}
	kind := object.GetObjectKind().GroupVersionKind()
	resource, ok := gvk.ToGVR(config.FromKubernetesGVK(kind))
	if !ok {
		return place{}, fmt.Errorf("no resource is known for %s", kind)
	}
	at := place{resource: resource, namespace: meta.GetNamespace(), name: meta.GetName()}
	switch {
	case strings.HasSuffix(kind.Group, "istio.io"):
		at.tracker = client.Istio().(*istiofake.Clientset).Tracker()
	case kind.Group == gvk.KubernetesGateway.Group:
		at.tracker = client.GatewayAPI().(*gatewayfake.Clientset).Tracker()
	default:
		at.tracker = client.Kube().(*fake.Clientset).Tracker()
	}
	return at, nil
}

// meshConfigOf is what the ConfigMap `istio` of the root namespace says, over Istio's defaults.
func meshConfigOf(objects map[string]runtime.Object) (*meshconfig.MeshConfig, error) {
	for _, object := range objects {
		if c, ok := object.(*corev1.ConfigMap); ok && c.Namespace == "istio-system" && c.Name == "istio" {
			return mesh.ApplyMeshConfigDefaults(c.Data["mesh"])
		}
	}
	return mesh.DefaultMeshConfig(), nil
}

// read gives the objects of every YAML file of a folder, by kind, namespace and name.
func read(folder string) (map[string]runtime.Object, error) {
	files, err := filepath.Glob(filepath.Join(folder, "*.yaml"))
	if err != nil {
		return nil, err
	}
	sort.Strings(files)
	decode := kube.IstioCodec.UniversalDeserializer().Decode
	objects := map[string]runtime.Object{}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		for _, document := range strings.Split("\n"+string(text), "\n---") {
			if blank(document) {
				continue
			}
			object, kind, err := decode([]byte(document), nil, nil)
			if runtime.IsNotRegisteredError(err) {
				// Of nobody Istio knows.
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("%s: %w: %s", file, err, document)
			}
			object.GetObjectKind().SetGroupVersionKind(*kind)
			meta, ok := object.(metav1.Object)
			if !ok {
				return nil, fmt.Errorf("%s: a %s has no metadata", file, kind)
			}
			objects[fmt.Sprintf("%s %s/%s", kind, meta.GetNamespace(), meta.GetName())] = object
		}
	}
	for _, object := range objects {
		addDefaults(object)
	}
	enrol(objects)
	return objects, nil
}

// addDefaults says of ports what the API server says where nobody does.
func addDefaults(object runtime.Object) {
	switch o := object.(type) {
	case *corev1.Service:
		for i := range o.Spec.Ports {
			port := &o.Spec.Ports[i]
			if port.Protocol == "" {
				port.Protocol = corev1.ProtocolTCP
			}
			if port.TargetPort == (intstr.IntOrString{}) {
				port.TargetPort = intstr.FromInt32(port.Port)
			}
		}
	case *corev1.Pod:
		for _, containers := range [][]corev1.Container{o.Spec.InitContainers, o.Spec.Containers} {
			for _, container := range containers {
				for i := range container.Ports {
					if container.Ports[i].Protocol == "" {
						container.Ports[i].Protocol = corev1.ProtocolTCP
					}
				}
			}
		}
	}
}

// enrol annotates the pods that the CNI agent would redirect.
func enrol(objects map[string]runtime.Object) {
	ambient := map[string]bool{}
	for _, object := range objects {
		if namespace, ok := object.(*corev1.Namespace); ok {
			ambient[namespace.Name] = namespace.Labels[label.IoIstioDataplaneMode.Name] == "ambient"
		}
	}
	for _, object := range objects {
		pod, ok := object.(*corev1.Pod)
		if !ok || pod.Spec.HostNetwork || pod.Namespace == "istio-system" {
			continue
		}
		mode, own := pod.Labels[label.IoIstioDataplaneMode.Name]
		if mode == "ambient" || (!own && ambient[pod.Namespace]) {
			if pod.Annotations == nil {
				pod.Annotations = map[string]string{}
			}
			pod.Annotations[annotation.AmbientRedirection.Name] = "enabled"
		}
	}
}

// blank tells whether a document holds nothing but space and comments.
func blank(document string) bool {
	for _, line := range strings.Split(document, "\n") {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
			return false
		}
	}
	return true
}
