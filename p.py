import sys, torch, json, steerable as st
from steerable import models, sinks
from steerable.sites import Site, tap
name,src=sys.argv[1:3]
m,t=st.load(name)
L=models.n_layers(m)
if src=="chains":
    tasks={x["id"]:x for x in map(json.loads,open('/tmp/sinks/new/tasks.jsonl'))}
    texts=[]
    for c in list(map(json.loads,open('/tmp/sinks/new/chains.jsonl')))[:24]:
        texts.append(t.apply_chat_template([{"role":"user","content":tasks[c["task_id"]]["prompt"]}],tokenize=False,add_generation_prompt=True)+c["thinking"]+c["answer"])
else:
    texts=[open(src).read()[i:i+1500] for i in range(0,30000,1500)]
    texts=[t.apply_chat_template([{"role":"user","content":x[:200]}],tokenize=False,add_generation_prompt=True)+x[200:] for x in texts]
R={l:[] for l in range(L)}; W={l:[] for l in range(L)}
for x in texts:
    ids=t(x,return_tensors="pt",add_special_tokens=False)["input_ids"]
    got={}
    with tap(m,{Site("resid_post",l):(lambda h,l=l: got.__setitem__(l,h[0].float().norm(dim=-1))) for l in range(L)}): m(ids)
    for l in range(L):
        n=got[l]; o=n[:64].sort().values[(min(len(n),64)-1)//2]
        r=n/o; R[l].append(r[1:]); W[l]+=[(round(float(r[i]),1),i,t.decode(ids[0,i])) for i in r[1:].topk(3).indices+1]; 
for l in range(L):
    a=torch.cat(R[l]); q=[float(a.quantile(p)) for p in (.01,.25,.5,.75,.95,.99,.999)]
    print(l,["%.2f"%x for x in q],"max %.1f"%a.max(), sorted(W[l])[-5:])
